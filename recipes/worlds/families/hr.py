"""HR: leave and expenses, with notice, blocked seasons, staff cover, receipts and a manager's approval."""

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

GRANT = (
    Do("approval", {"role": By("approver")}),
    Stop("denied by superior", Is("approval.answer", "yes", likely=0.7), unless=True),
    "book",
    Do("book", {"days": Of("leave.days")}),
    Check("leave"),
    End("booked", "leave.days"),
)

FAMILY = Family(
    name="hr",
    places="[the people desk of|the personnel office of] [a hospital|a factory|a design studio|a university]",
    requester="employee",
    records={
        "employee|worker|staffer": Record(
            {
                "contract|employment": Word("permanent|temporary|trainee|hourly"),
                "grade|band": Word("junior|senior|lead|partner"),
                "probation|trial_period": Word("running|passed|extended"),
                "login|access": Word("valid|locked"),
                "attendance|presence": Word("working|sick|away"),
                "leave_balance|remaining_days|open_days": Number(0, 40),
            }
        ),
        "leave|absence|furlough": Record(
            {
                "employee": Ref("employee"),
                "rota": Ref("rota"),
                "days|length|duration": Number(1, 25),
                "first_day|starts_on|begins_on": Number(20, 350, day=True),
                "notice_days|days_ahead|lead_days": Number(0, 60),
                "season|quarter": Word("winter|spring|summer|autumn"),
                "reason|purpose": Word("study|care|moving|wedding|travel"),
                "status|decision_state": Word("requested|approved|taken|refused"),
                "stage|phase": Word("requested|approved|taken|refused"),
            }
        ),
        "expense|outlay|voucher": Record(
            {
                "employee": Ref("employee"),
                "amount|total|cost": Number(5, 900),
                "category|heading": Word("travel|meals|hotel|training|equipment|fuel"),
                "receipt|proof": Word("attached|missing|unreadable"),
                "age_days|days_since_purchase": Number(0, 120),
                "settlement|payout_state": Word("draft|submitted|paid"),
            }
        ),
        "rota|roster|schedule": Record(
            {
                "shift|turn": Word("early|late|night|weekend"),
                "cover|backup": Word("full|partial|short"),
                "absent_percent|away_percent": Number(0, 60),
            }
        ),
    },
    rules={
        "blocked season|closed season": Choice(of="leave.season"),
        "least notice|notice needed": Limit(5, 40, by="employee.contract"),
        "free days|days without approval": Limit(4, 12),
        "planning horizon|last bookable day": Limit(90, 320, by="employee.grade", day=True),
        "approver|line manager": Choice("manager|director|supervisor|chair"),
        "break reason|accepted reason": Choice(of="leave.reason"),
        "barred expense|excluded expense": Choice(of="expense.category"),
        "claim window|filing window": Limit(20, 100, 5, rare="expense.category"),
        "expense limit|spending limit": Limit(50, 600, 25, by="employee.grade"),
        "doctor note|medical note": Choice("always|later|never", by="employee.contract"),
        "valid field|leading field": Choice(fields=("leave.status", "leave.stage")),
        "unused days|leftover days": Choice("carry|payout|forfeit"),
        "expense desk|payout desk": Choice("payroll|treasury|audit|facilities", by="expense.category", missing=0.3),
    },
    actions={
        "approval|clearance|sign_off": Action(
            "leave", {"role|rank": Word("manager")}, gives={"answer|verdict": Word("yes|no")}
        ),
        "book|grant|enter": Action(
            "leave", {"days|length": Number(1, 99)}, {"status": "approved", "stage": "approved"}
        ),
        "withdraw|revoke|cancel": Action("leave", sets={"status": "withdrawn", "stage": "withdrawn"}),
        "review|audit|inspect": Action(
            "expense", {"role|rank": Word("manager")}, gives={"finding|outcome": Word("clean|doubtful|false")}
        ),
        "reimburse|pay_back|repay": Action("expense", {"amount|sum": Number(1, 999)}, {"settlement": "paid"}),
        "ask_proof|request_proof|demand_proof": Action("expense"),
        "forward|pass_on|route": Action("expense", {"desk|to": Word("payroll")}),
        "log_sick|record_sick|enter_sick": Action(
            "employee", {"until|last_day": Word("monday")}, {"attendance": "sick"}
        ),
        "carry|move_days|roll_over": Action("employee", {"days|number": Number(1, 20)}),
    },
    kinds={
        "annual leave|paid leave|time off": Kind(
            "a vacation, paid holidays",
            (
                "[please|can you] book the vacation {id} [for me|]",
                "I want to go on vacation, [it is|the request is] {id}",
                "can I [take|have] the holidays {id}",
                "my vacation {id} [needs|is waiting for] a decision",
            ),
            "leave",
            (
                Read("leave"),
                Jump("notice", Is("employee.grade", "lead", likely=0.25)),
                Stop("refused, blocked season", Is("leave.season", rule="blocked season", likely=0.25)),
                "notice",
                Stop("refused, short notice", Over("leave.notice_days", "least notice", likely=0.75), unless=True),
                Jump("book", Over("leave.days", "free days", likely=0.75), unless=True),
                Read("rota", by="leave.rota"),
                Stop("refused, few people", Is("rota.cover", "short", likely=0.25)),
                *GRANT,
            ),
        ),
        "long break|career break": Kind(
            "an unpaid absence, a sabbatical",
            (
                "I [would like|want] to go unpaid for {id}",
                "[please|] grant me the sabbatical {id}",
                "can {id} be taken as a sabbatical",
                "[my|the] unpaid absence {id}, is it possible",
            ),
            "leave",
            (
                Read("leave"),
                Stop("refused, on probation", Is("employee.probation", "running", likely=0.3)),
                Stop("too far ahead", Over("leave.first_day", "planning horizon", likely=0.25)),
                Stop("refused, wrong reason", Is("leave.reason", rule="break reason", likely=0.7), unless=True),
                Read("rota", by="leave.rota"),
                Jump("ask", Is("rota.cover", "full", likely=0.6)),
                Stop("refused, night staff", Is("rota.shift", "night", likely=0.4)),
                "ask",
                *GRANT,
            ),
        ),
        "sickness|sick report": Kind(
            "being sick, a sick report",
            (
                "I am sick [and cannot work|] until {day}",
                "[please|] note that I am sick until {day}",
                "I [called in|am at home] sick, [likely|] until {day}",
            ),
            "employee",
            (
                Stop("doctor note needed first", Says("doctor note", "always")),
                Do("log_sick", {"until": Asked("day")}),
                Check("employee"),
                Jump("later", Says("doctor note", "later")),
                End("logged"),
                "later",
                End("note within three days"),
            ),
            {"day": Word("monday|tuesday|wednesday|thursday|friday")},
        ),
        "expense claim|repayment": Kind(
            "money spent for work, to be reimbursed",
            (
                "[please|] see that {id} gets reimbursed",
                "I spent my own money on {id}, [please pay it|can I have it]",
                "I want to be reimbursed for {id}",
                "{id} [should|must] be reimbursed [this month|soon|]",
            ),
            "expense",
            (
                Read("expense"),
                Stop("refused, not covered", Is("expense.category", rule="barred expense", likely=0.2)),
                Stop("refused, too old", Over("expense.age_days", "claim window", likely=0.25)),
                Jump("proof", Is("expense.receipt", "attached", likely=0.75), unless=True),
                Jump("pay", Over("expense.amount", "expense limit", likely=0.65), unless=True),
                Do("review", {"role": By("approver")}),
                Jump("proof", Is("review.finding", "doubtful", likely=0.3)),
                Stop("refused after review", Is("review.finding", "false", likely=0.35)),
                "pay",
                Do("reimburse", {"amount": Of("expense.amount")}),
                Check("expense"),
                End("paid back", "expense.amount"),
                "proof",
                Do("ask_proof"),
                End("receipt asked for"),
            ),
        ),
        "late payout|slow payout": Kind(
            "an expense whose payout is overdue",
            (
                "the payout [for|of] {id} is overdue",
                "[I am|] still waiting for the payout of {id}",
                "why is the money for {id} overdue",
                "[please|can you] chase the payout of {id}",
            ),
            "expense",
            (
                Read("expense"),
                Stop("already paid", Is("expense.settlement", "paid", likely=0.25)),
                Stop("not handed in", Is("expense.settlement", "draft", likely=0.2)),
                Stop("no desk for it", Says("expense desk", "none")),
                Do("forward", {"desk": By("expense desk")}),
                End("passed on"),
            ),
        ),
        "withdrawal|calling off": Kind(
            "a request for leave to withdraw",
            (
                "[please|] withdraw [my request|the request] {id}",
                "I [want|have|need] to withdraw {id}, my plans changed",
                "can you withdraw {id} [for me|again]",
            ),
            "leave",
            (
                Read("leave"),
                Stop("already taken", Counts("valid field", "taken", likely=0.2)),
                Jump("drop", Counts("valid field", "requested", likely=0.3)),
                Do("approval", {"role": By("approver")}),
                Stop("must stand", Is("approval.answer", "no", likely=0.4)),
                "drop",
                Do("withdraw"),
                Check("leave"),
                End("withdrawn"),
            ),
        ),
        "carry over|year end": Kind(
            "days to carry into the next year",
            (
                "carry {days} days into [the next|next] year",
                "[please|] carry {days} of my days over",
                "[I want|I would like] to carry {days} days over",
            ),
            "employee",
            (
                Stop("days are lost", Says("unused days", "forfeit")),
                Jump("salary", Says("unused days", "payout")),
                Stop("not for trainees", Is("employee.contract", "trainee", likely=0.25)),
                Do("carry", {"days": Asked("days")}),
                End("carried over"),
                "salary",
                End("paid with salary"),
            ),
            {"days": Number(1, 20)},
        ),
        "days left|day count": Kind(
            "the balance, how many days remain",
            (
                "[what is|tell me] my leave balance",
                "how many days remain for me",
                "how many days [of leave|] remain this year",
                "[please|] look up the balance of my days",
            ),
            "employee",
            (Read("employee"), End("days left", "employee.leave_balance")),
        ),
        "staffing|crew size": Kind(
            "how much of a crew is absent, who is missing",
            (
                "how many are absent [on|in] {id}",
                "what share of {id} is absent [now|]",
                "[please|] tell me how many are missing on {id}",
            ),
            "rota",
            (
                Read("rota"),
                Jump("thin", Is("rota.cover", "short", likely=0.4)),
                End("absent percent", "rota.absent_percent"),
                "thin",
                End("short of people"),
            ),
        ),
        "leave status|leave state": Kind(
            "whether leave was approved",
            (
                "is {id} approved [yet|already|now]",
                "has {id} been approved [yet|]",
                "[please|] tell me whether {id} will happen",
                "was {id} approved by [anyone|my boss]",
            ),
            "leave",
            (
                Read("leave"),
                Jump("yes", Counts("valid field", "approved", likely=0.5)),
                End("not approved"),
                "yes",
                End("approved"),
            ),
        ),
    },
    opening=(Read("employee"), Stop("access locked", Is("employee.login", "locked", likely=0.05))),
)
