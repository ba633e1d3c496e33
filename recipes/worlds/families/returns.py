"""Returns: a shop takes goods back, within windows, limits and exceptions."""

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

PAY = (
    Jump("money", Is("customer.tier", rule="trusted tier", likely=0.3)),
    Jump("money", Over("order.amount", "refund limit", likely=0.4), unless=True),
    Do("approval", {"role": By("approver")}),
    Stop("denied by approver", Is("approval.answer", "yes", likely=0.7), unless=True),
    "money",
    Do("refund", {"amount": Of("order.amount"), "version": By("version")}),
    Check("order"),
    End("refunded", "order.amount"),
)

FAMILY = Family(
    name="returns",
    places="[the returns desk of|a service desk for] [a shop|an online store|a department store]",
    requester="customer",
    records={
        "customer|buyer|client": Record(
            {
                "tier|level|class": Word("basic|silver|gold"),
                "check|identity|verification": Word("passed|failed"),
                "region|area": Word("north|south|east|west"),
            }
        ),
        "order|purchase|sale": Record(
            {
                "customer": Ref("customer"),
                "amount|total|price|sum": Number(5, 450),
                "category|department|section": Word("home|garden|sport|music|jewelry|food"),
                "days_since_delivery|days_delivered|age_days": Number(0, 90),
                "status|progress": Word("open|packed|shipped|delivered"),
                "state|stage": Word("open|packed|shipped|delivered"),
            }
        ),
        "parcel|shipment|package": Record(
            {
                "carrier|shipper": Word("dhl|ups|dpd|gls"),
                "place|location": Word("depot|truck|lost|door"),
                "days_moving|transit_days": Number(1, 20),
            }
        ),
    },
    rules={
        "refund limit|payback limit": Limit(40, 420, 20, by="customer.tier"),
        "return window|return period": Limit(7, 60, rare="order.category"),
        "no returns|excluded goods": Choice(of="order.category"),
        "late mark|delay mark": Limit(3, 12),
        "goodwill|late credit": Limit(5, 40, 5),
        "trusted tier|free tier": Choice(of="customer.tier"),
        "approver|sign-off": Choice("supervisor|manager|finance|director"),
        "version|interface": Choice("v1|v2|v3|v4"),
        "lost parcels|lost goods": Choice("refund|replacement"),
        "spare depot|reserve store": Choice("dock|annex|hangar|cellar"),
        "true field|field that counts": Choice(fields=("order.status", "order.state")),
        "identity check|id check": Choice("always|never"),
    },
    actions={
        "refund|reimburse|pay_back": Action(
            "order", {"amount|sum": Number(1, 999), "version|api": Word("v1")}, {"status": "refunded"}
        ),
        "approval|sign_off|clearance": Action(
            "order", {"role|by": Word("manager")}, gives={"answer|verdict": Word("yes|no")}
        ),
        "replace|resend": Action("order", {"version|api": Word("v1")}, {"status": "replaced"}),
        "cancel|void|stop": Action("order", sets={"status": "cancelled"}),
        "redirect|readdress": Action("parcel", {"address|destination": Word("address")}),
        "credit|compensate": Action("customer", {"amount|sum": Number(1, 99)}),
        "label|tag": Action("order", {"text": Word("x")}),
    },
    kinds={
        "return|take back": Kind(
            "goods to return, a return",
            (
                "[I want to|can I] return {id}, [I do not need it|it is unopened]",
                "[please|] make a return of {id}",
                "return {id} [for me|] please",
            ),
            "order",
            (
                Read("order"),
                Stop("denied, excluded goods", Is("order.category", rule="no returns", likely=0.2)),
                Stop("denied, too late", Over("order.days_since_delivery", "return window", likely=0.3)),
                *PAY,
            ),
        ),
        "damage|breakage": Kind(
            "goods that came damaged or broken",
            (
                "{id} [arrived|came] [damaged|broken]",
                "the [item|thing] in {id} is broken",
                "{id} was damaged on arrival",
            ),
            "order",
            (
                Read("order"),
                Stop("denied, too late", Over("order.days_since_delivery", "return window", likely=0.3)),
                Do("replace", {"version": By("version")}),
                Check("order"),
                End("replaced"),
            ),
        ),
        "cancellation|calling off": Kind(
            "orders to cancel",
            (
                "[please|] cancel [my order|] {id}",
                "I [want|would like] to cancel {id}",
                "cancel {id}, I changed my mind",
            ),
            "order",
            (
                Read("order"),
                Stop("denied, not open", Counts("true field", "open", likely=0.6), unless=True),
                Do("cancel"),
                Check("order"),
                End("cancelled"),
            ),
        ),
        "lost goods|missing parcel": Kind(
            "parcels that never arrived",
            ("{id} never arrived", "[my|the] parcel {id} never arrived", "parcel {id} never arrived [at all|here]"),
            "parcel",
            (
                Read("parcel"),
                Stop("not lost", Is("parcel.place", "lost", likely=0.7), unless=True),
                Jump("again", Says("lost parcels", "replacement")),
                Do("credit", {"amount": By("goodwill")}),
                End("credited"),
                "again",
                Do("redirect", {"address": By("spare depot")}),
                End("sent again"),
            ),
        ),
        "delay|lateness": Kind(
            "parcels that are late",
            ("{id} is late", "{id} is [very|too|much too] late", "why is {id} so late"),
            "parcel",
            (
                Read("parcel"),
                Stop("not late", Over("parcel.days_moving", "late mark", likely=0.6), unless=True),
                Do("credit", {"amount": By("goodwill")}),
                End("credited"),
            ),
        ),
        "new address|redirection": Kind(
            "parcels to go to another address",
            (
                "[send|deliver] {id} to the address {to}",
                "the address of {id} must be {to}",
                "new address for {id}: {to}",
            ),
            "parcel",
            (Read("parcel"), Do("redirect", {"address": Asked("to")}), Check("parcel"), End("redirected")),
            {"to": Word("address")},
        ),
        "order status|order state": Kind(
            "the status of an order",
            ("what is the status of {id}", "tell me the status of {id}", "status of {id}"),
            "order",
            (
                Read("order"),
                Jump("second", Counts("true field", "open", likely=0.5)),
                End("under way"),
                "second",
                End("open"),
            ),
        ),
        "price|cost": Kind(
            "what an order cost",
            ("what did {id} cost", "how much did {id} cost", "tell me the cost of {id}"),
            "order",
            (Read("order"), End("it cost", "order.amount")),
        ),
        "place of parcel|whereabouts": Kind(
            "where a parcel is",
            ("where is {id}", "[please|] tell me where {id} is", "where did {id} get to"),
            "parcel",
            (Read("parcel"), End("it is here", "parcel.place")),
        ),
    },
    opening=(
        Read("customer"),
        Jump("checked", Says("identity check", "never")),
        Stop("identity not verified", Is("customer.check", "failed", likely=0.05)),
        "checked",
    ),
)
