"""Procurement: quotes, vendors and contracts, with spending limits, signing offices and notice."""

from worlds.spec import (
    Action,
    Asked,
    By,
    Check,
    Choice,
    Counts,
    Do,
    End,
    Family,
    Is,
    Jump,
    Kind,
    Limit,
    Number,
    Of,
    Over,
    Read,
    Record,
    Ref,
    Says,
    Stop,
    Word,
)

SIGN_AND_ORDER = (
    Jump("order", Over("quote.amount", "spending limit", likely=0.6), unless=True),
    "sign",
    Do("sign_off", {"office": By("signing office")}),
    Stop("put off", Is("sign_off.decision", "deferred", likely=0.2)),
    Stop("not granted", Is("sign_off.decision", "granted", likely=0.6), unless=True),
    "order",
    Do("order", {"sum": Of("quote.amount"), "channel": By("order channel")}),
    Check("quote"),
    End("ordered", "quote.amount"),
)

FAMILY = Family(
    name="procurement",
    places="[the purchasing desk|the procurement office] of [a hospital|a university|a city council|a builder]",
    requester="employee",
    records={
        "employee|staffer|colleague": Record(
            {
                "grade|rank|seniority": Word("junior|senior|lead"),
                "unit|division|faculty": Word("research|estates|clinic|office"),
                "login|access|account_state": Word("open|locked|limited"),
                "budget_used|spent_share|used_percent": Number(20, 100),
            }
        ),
        "quote|bid|offer": Record(
            {
                "employee": Ref("employee"),
                "vendor": Ref("vendor"),
                "amount|net_price|quoted_total": Number(200, 6000),
                "category|commodity|goods_group": Word("paper|tools|software|furniture|chemicals"),
                "age_days|days_since_issue|days_old": Number(0, 80),
                "stage|progress": Word("draft|sent|accepted|rejected"),
                "status|state": Word("draft|sent|accepted|rejected"),
            }
        ),
        "vendor|supplier|seller": Record(
            {
                "standing|listing|register_state": Word("approved|trial|blocked|applicant"),
                "score|rating|points": Number(20, 100),
                "paperwork|tax_forms|documents": Word("complete|missing|expired"),
                "base|home_market|origin": Word("domestic|european|overseas"),
                "complaints|incidents|claims": Number(0, 20),
            }
        ),
        "contract|agreement|framework": Record(
            {
                "vendor": Ref("vendor"),
                "days_left|remaining_days|days_to_expiry": Number(0, 300),
                "condition|term_state|force": Word("active|expired|suspended|draft"),
                "scope|coverage|reach": Word("local|regional|national"),
                "drawn|called_off|value_used": Number(500, 9000),
                "signed_on|signature_date|concluded_on": Number(0, 330, day=True),
            }
        ),
    },
    rules={
        "spending limit|purchase limit": Limit(500, 5000, 250, by="employee.grade"),
        "quote lifetime|bid lifetime": Limit(14, 60, rare="quote.category"),
        "frozen goods|barred goods": Choice(of="quote.category"),
        "signing office|approving office": Choice("controller|director|treasurer|board", by="employee.unit"),
        "expert team|category team": Choice(
            "facilities|technology|laboratory|general", by="quote.category", missing=0.3
        ),
        "binding field|field that binds": Choice(fields=("quote.stage", "quote.status")),
        "pass mark|lowest score": Limit(30, 85, 5),
        "reform day|new terms day": Limit(60, 300, day=True),
        "order channel|order route": Choice("portal|email|courier|terminal"),
        "renewal mode|renewal policy": Choice("prolong|retender|review"),
        "exit notice|leaving notice": Limit(30, 150, 15, by="contract.scope"),
        "complaint ceiling|claims ceiling": Limit(4, 12, rare="vendor.base"),
        "refill mark|top-up mark": Limit(40, 95, 5),
    },
    actions={
        "order|purchase|buy": Action(
            "quote", {"sum|value": Number(1, 9999), "channel|via": Word("portal")}, {"stage": "ordered"}
        ),
        "sign_off|authorize|clear": Action(
            "quote",
            {"office|authority": Word("board")},
            gives={"decision|ruling|verdict": Word("granted|refused|deferred")},
        ),
        "assign|route|delegate": Action("quote", {"team|desk": Word("general")}, {"stage": "assigned"}),
        "register|enroll|onboard": Action("vendor", {"market|region": Word("domestic")}, {"standing": "approved"}),
        "block|bar|suspend": Action("vendor", {"count|cases": Number(0, 99)}, {"standing": "blocked"}),
        "extend|prolong|renew": Action("contract", {"days|term": Number(1, 999)}, {"condition": "active"}),
        "terminate|end|wind_up": Action("contract", {"notice|notice_days": Number(1, 999)}, {"condition": "ended"}),
        "allot|fund|allocate": Action("employee", {"extra|increase": Number(1, 9999)}),
        "archive|file_away|store": Action("contract", {"folder|shelf": Word("x")}),
    },
    kinds={
        "purchase|buying": Kind(
            "quotes to order from",
            (
                "[please|] order what {id} lists",
                "[I want to|can I] place an order on {id}",
                "order [everything on|all of] {id} for [my unit|us]",
            ),
            "quote",
            (
                Read("quote"),
                Stop("refused, frozen goods", Is("quote.category", rule="frozen goods", likely=0.2)),
                Stop("refused, too old", Over("quote.age_days", "quote lifetime", likely=0.25)),
                Read("vendor", by="quote.vendor"),
                Stop("refused, vendor blocked", Is("vendor.standing", "blocked", likely=0.2)),
                Jump("sign", Is("vendor.standing", "trial", likely=0.3)),
                *SIGN_AND_ORDER,
            ),
        ),
        "rush|emergency": Kind(
            "urgent needs, bought at once",
            (
                "urgent: [please|quickly] buy {id} [today|]",
                "{id} is urgent, [buy it today|we need it today]",
                "[we have|there is] an urgent need for {id}",
            ),
            "quote",
            (
                Read("quote"),
                Read("vendor", by="quote.vendor"),
                Stop("vendor not approved", Is("vendor.standing", "approved", likely=0.75), unless=True),
                *SIGN_AND_ORDER,
            ),
        ),
        "assessment|second look": Kind(
            "quotes for experts to examine",
            (
                "[please|] have someone examine {id}",
                "[the|our] experts should [see|look at] {id} [first|soon]",
                "can you [examine|have experts check] {id}",
            ),
            "quote",
            (
                Read("quote"),
                Stop("decided before", Counts("binding field", "accepted", likely=0.3)),
                Stop("no experts for it", Says("expert team", "none")),
                Do("assign", {"team": By("expert team")}),
                Check("quote"),
                End("passed to experts"),
            ),
        ),
        "intake|new supplier": Kind(
            "vendors to register",
            (
                "[please|can you] register {id} with us",
                "I [want|would like] to register {id}",
                "register {id} as a supplier [please|]",
            ),
            "vendor",
            (
                Read("vendor"),
                Stop("not an applicant", Is("vendor.standing", "applicant", likely=0.75), unless=True),
                Stop("papers not complete", Is("vendor.paperwork", "complete", likely=0.75), unless=True),
                Stop("too many complaints", Over("vendor.complaints", "complaint ceiling", likely=0.2)),
                Jump("weak", Over("vendor.score", "pass mark", likely=0.65), unless=True),
                Do("register", {"market": Of("vendor.base")}),
                Check("vendor"),
                End("registered"),
                "weak",
                End("score too low", "vendor.score"),
            ),
        ),
        "ban|blacklisting": Kind(
            "bad vendors to exclude",
            (
                "exclude {id}, [they|it] failed us again",
                "[please|] exclude {id} from now on",
                "we [must|should] exclude {id} [after this mess|for good]",
            ),
            "vendor",
            (
                Read("vendor"),
                Stop("blocked before", Is("vendor.standing", "blocked", likely=0.2)),
                Stop("too few complaints", Over("vendor.complaints", "complaint ceiling", likely=0.6), unless=True),
                Do("block", {"count": Of("vendor.complaints")}),
                Check("vendor"),
                End("excluded"),
            ),
        ),
        "extension|prolongation": Kind(
            "contracts to extend",
            (
                "extend {id} by {days} days",
                "[please|] extend {id} for [another|a further] {days} days",
                "I [want|have] to extend {id} {days} days",
            ),
            "contract",
            (
                Read("contract"),
                Stop("not active", Is("contract.condition", "active", likely=0.75), unless=True),
                Stop("too late", Over("contract.days_left", "exit notice", likely=0.7), unless=True),
                Jump("vendor", Says("renewal mode", "review")),
                Jump("tender", Says("renewal mode", "retender")),
                Do("extend", {"days": Asked("days")}),
                Check("contract"),
                End("extended"),
                "vendor",
                Read("vendor", by="contract.vendor"),
                Stop("vendor too weak", Over("vendor.score", "pass mark", likely=0.6), unless=True),
                Do("extend", {"days": Asked("days")}),
                End("extended after review"),
                "tender",
                End("to be retendered"),
            ),
            {"days": Number(10, 360)},
        ),
        "exit|ending": Kind(
            "contracts to terminate",
            (
                "terminate {id} [for us|at once] [please|]",
                "we [want|have] to terminate {id}",
                "can we terminate {id} [now|early|this year]",
            ),
            "contract",
            (
                Read("contract"),
                Stop("expired before", Is("contract.condition", "expired", likely=0.2)),
                Stop("new terms bind", Over("contract.signed_on", "reform day", likely=0.25)),
                Jump("late", Over("contract.days_left", "exit notice", likely=0.6), unless=True),
                Do("terminate", {"notice": By("exit notice")}),
                Check("contract"),
                End("terminated"),
                "late",
                End("runs out anyway", "contract.days_left"),
            ),
        ),
        "allowance|funds": Kind(
            "budget for the requester",
            (
                "my budget needs {sum} on top",
                "[please|] raise my budget by {sum}",
                "add {sum} to my budget [please|this month|]",
            ),
            "employee",
            (
                Read("employee"),
                Stop("not for juniors", Is("employee.grade", "junior", likely=0.3)),
                Stop("enough left", Over("employee.budget_used", "refill mark", likely=0.5), unless=True),
                Do("allot", {"extra": Asked("sum")}),
                End("budget raised"),
            ),
            {"sum": Number(100, 3000)},
        ),
        "cost|figure": Kind(
            "the price of a quote",
            (
                "what is the price [on|of] {id}",
                "tell me the price of {id}",
                "which price does {id} [give|ask|state]",
            ),
            "quote",
            (Read("quote"), End("it costs", "quote.amount")),
        ),
        "usage|call-offs": Kind(
            "value drawn on a contract",
            (
                "how much was drawn on {id}",
                "what has been drawn [from|on] {id} [so far|]",
                "tell me the value drawn on {id}",
            ),
            "contract",
            (Read("contract"), End("drawn so far", "contract.drawn")),
        ),
    },
    opening=(
        Read("employee"),
        Stop("login is locked", Is("employee.login", "locked", likely=0.05)),
    ),
)
