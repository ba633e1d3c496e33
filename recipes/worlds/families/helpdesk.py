"""Helpdesk: an IT team resets passwords, lends devices, routes incidents by a table and grants software."""

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

SIGN = (
    Jump("signed", Over("device.worth", "spending cap", likely=0.5), unless=True),
    Do("approve", {"signer": By("signer")}),
    Stop("signer said no", Is("approve.decision", "yes", likely=0.7), unless=True),
    "signed",
)
TRAINED = (
    Jump("trained", Says("training rule", "optional")),
    Stop("course comes first", Is("employee.course", "overdue", likely=0.3)),
    "trained",
)

FAMILY = Family(
    name="helpdesk",
    places="[the IT helpdesk|the service desk|the IT support team] of [a university|a bank|a city council|an insurer]",
    requester="employee",
    records={
        "employee|colleague|worker": Record(
            {
                "rank|seniority|staff_level": Word("junior|senior|lead|executive"),
                "callback|voice_check": Word("confirmed|refused"),
                "course|security_course": Word("done|overdue|waived"),
                "lock|lock_state": Word("open|locked|suspended"),
                "failed_logins|bad_attempts": Number(0, 14),
            }
        ),
        "device|machine|gadget": Record(
            {
                "category|device_class": Word("laptop|tablet|phone|projector|monitor"),
                "months_old|age_months": Number(1, 72),
                "warranty|maker_cover": Word("valid|expired"),
                "worth|book_value": Number(60, 2400),
                "shelf|stock_state": Word("available|lent|repair|scrapped"),
                "register|asset_list": Word("available|lent|repair|scrapped"),
            }
        ),
        "incident|fault|disruption": Record(
            {
                "employee": Ref("employee"),
                "device": Ref("device"),
                "area|subject": Word("network|mail|printing|hardware|database"),
                "impact|reach": Word("single|floor|building|company"),
                "hours_waiting|waited_hours": Number(0, 60),
                "progress|work_state": Word("fresh|assigned|solved|parked"),
                "workaround|bypass": Word("working|missing"),
            }
        ),
        "licence|subscription": Record(
            {
                "employee": Ref("employee"),
                "yearly_cost|annual_price": Number(20, 2400),
                "seats|seat_state": Word("free|full|reserved"),
                "days_to_expiry|days_left": Number(0, 365),
                "risk|risk_grade": Word("low|medium|high"),
                "suite|product_line": Word("design|office|coding|statistics"),
            }
        ),
    },
    rules={
        "attempt limit|lockout limit": Limit(4, 10, by="employee.rank"),
        "spending cap|price ceiling": Limit(200, 2000, 100, by="employee.rank"),
        "response hours|reaction hours": Limit(4, 40, 4, rare="incident.area"),
        "priority|urgency level": Choice("low|normal|high|critical", by="incident.impact"),
        "support group|duty team": Choice("backbone|desktop|applications|security", by="incident.area", missing=0.3),
        "class kept back|class not lent": Choice(of="device.category"),
        "stock source|stock field": Choice(fields=("device.shelf", "device.register")),
        "training rule|course rule": Choice("required|optional"),
        "reset route|reset channel": Choice("email|phone|post|counter"),
        "renewal age|replacement age": Limit(18, 60, 6),
        "signer|budget holder": Choice("manager|auditor|director|controller"),
        "loan days|loan period": Limit(5, 30, 5),
    },
    actions={
        "verify|challenge|quiz": Action("employee", gives={"outcome|quiz_result": Word("match|mismatch|silence")}),
        "reset|renew|reissue": Action("employee", {"channel|route": Word("email")}, {"lock": "open"}),
        "approve|authorize|countersign": Action(
            "device", {"signer|by": Word("manager")}, gives={"decision|ruling": Word("yes|no")}
        ),
        "lend|loan_out|issue": Action(
            "device", {"days|duration": Number(1, 60)}, {"shelf": "lent", "register": "lent"}
        ),
        "take_in|restock|check_in": Action("device", sets={"shelf": "available", "register": "available"}),
        "retire|scrap|write_off": Action("device", sets={"shelf": "scrapped", "register": "scrapped"}),
        "assign|route|dispatch": Action(
            "incident",
            {"group|team": Word("desktop"), "priority|level": Word("high")},
            {"progress": "assigned"},
        ),
        "raise|bump|promote": Action("incident", {"priority|level": Word("high")}, {"progress": "raised"}),
        "grant|allot|enable": Action("licence", {"cost|charge": Number(1, 9999)}, {"seats": "granted"}),
    },
    kinds={
        "password reset|new password": Kind(
            "a forgotten password",
            (
                "I [forgot|have forgotten] my password",
                "[can you|please] reset my password [today|]",
                "my password [no longer works|is not accepted any more]",
                "please set a new password for me",
            ),
            "employee",
            (
                Read("employee"),
                Stop("refused, account suspended", Is("employee.lock", "suspended", likely=0.3)),
                Jump("send", Over("employee.failed_logins", "attempt limit", likely=0.5), unless=True),
                Do("verify"),
                Stop("identity not proven", Is("verify.outcome", "match", likely=0.6), unless=True),
                "send",
                Do("reset", {"channel": By("reset route")}),
                Check("employee"),
                End("password sent"),
            ),
        ),
        "lockout|closed sign-in": Kind(
            "a sign-in that is locked",
            (
                "I am locked out of my [computer|account]",
                "my sign-in [is|seems to be] locked [again|]",
                "my account is locked, [please open it|I cannot work]",
            ),
            "employee",
            (
                Read("employee"),
                Stop("nothing is locked", Is("employee.lock", "open", likely=0.3)),
                Do("verify"),
                Stop("kept shut, mismatch", Is("verify.outcome", "mismatch", likely=0.35)),
                Do("reset", {"channel": By("reset route")}),
                End("opened again"),
            ),
        ),
        "device loan|lending": Kind(
            "a device to borrow",
            (
                "I [want|would like] to borrow {id}",
                "[may|can] I borrow {id} [for some time|for a project]",
                "[please|] let me borrow {id} next week",
            ),
            "device",
            (
                Read("device"),
                Stop("not in stock", Counts("stock source", "available", likely=0.8), unless=True),
                Stop("refused, not for loan", Is("device.category", rule="class kept back", likely=0.2)),
                *TRAINED,
                *SIGN,
                Do("lend", {"days": By("loan days")}),
                Check("device"),
                End("lent out"),
            ),
        ),
        "loan extension|longer loan": Kind(
            "a loan to extend",
            (
                "[please|] extend the loan of {id} by {days} days",
                "can you extend {id} by {days} days",
                "I need {id} {days} days longer, please extend it",
            ),
            "device",
            (
                Read("device"),
                Stop("not on loan", Counts("stock source", "lent", likely=0.75), unless=True),
                Stop("too old, bring back", Over("device.months_old", "renewal age", likely=0.25)),
                Do("lend", {"days": Asked("days")}),
                Check("device"),
                End("loan extended"),
            ),
            {"days": Number(2, 20)},
        ),
        "hand-in|bringing back": Kind(
            "handing in a device",
            (
                "I am handing in {id} [today|]",
                "{id} is ready for handing in",
                "[I no longer need {id},|project over,] handing in {id}",
            ),
            "device",
            (
                Read("device"),
                Jump("old", Over("device.months_old", "renewal age", likely=0.4)),
                Do("take_in"),
                Check("device"),
                End("back in stock"),
                "old",
                Do("retire"),
                End("taken out of use"),
            ),
        ),
        "incident report|assignment": Kind(
            "an incident that needs a technician",
            (
                "[please|] send a technician for {id}",
                "{id} needs a technician [soon|]",
                "which technician [will take|looks after] {id}",
            ),
            "incident",
            (
                Read("incident"),
                Stop("already solved", Is("incident.progress", "solved", likely=0.2)),
                Jump("nobody", Says("support group", "none")),
                Do("assign", {"group": By("support group"), "priority": By("priority")}),
                Check("incident"),
                End("assigned"),
                "nobody",
                Stop("use the workaround", Is("incident.workaround", "working", likely=0.4)),
                Do("raise", {"priority": By("priority")}),
                End("raised to the lead"),
            ),
        ),
        "slow response|overdue answer": Kind(
            "waiting too long for an answer",
            (
                "I [have been|am still] waiting for an answer to {id}",
                "still waiting on {id}, [what is going on|any news]",
                "{id} keeps me waiting [for too long|]",
            ),
            "incident",
            (
                Read("incident"),
                Stop("not overdue yet", Over("incident.hours_waiting", "response hours", likely=0.65), unless=True),
                Stop("workaround in place", Is("incident.workaround", "working", likely=0.25)),
                Do("raise", {"priority": By("priority")}),
                Check("incident"),
                End("raised"),
            ),
        ),
        "replacement|exchange": Kind(
            "a broken thing to swap",
            (
                "[please|] swap what {id} is about",
                "can you swap the broken thing in {id}",
                "{id} cannot be repaired, [please|] swap it",
            ),
            "incident",
            (
                Read("incident"),
                Stop("not a hardware matter", Is("incident.area", "hardware", likely=0.8), unless=True),
                Read("device", by="incident.device"),
                Jump("own", Is("device.warranty", "expired", likely=0.65)),
                Do("take_in"),
                End("sent to the maker"),
                "own",
                Stop("repair it instead", Over("device.months_old", "renewal age", likely=0.7), unless=True),
                *SIGN,
                Do("retire"),
                Check("device"),
                End("swap ordered"),
            ),
        ),
        "software request|new licence": Kind(
            "software that someone needs",
            (
                "I need the software {id} [for my work|]",
                "[please|] add the software {id} to my tools",
                "can I [have|get] the software {id}",
            ),
            "licence",
            (
                Read("licence"),
                Stop("too risky", Is("licence.risk", "high", likely=0.2)),
                *TRAINED,
                Stop("over the cap", Over("licence.yearly_cost", "spending cap", likely=0.25)),
                Jump("full", Is("licence.seats", "full", likely=0.3)),
                Do("grant", {"cost": Of("licence.yearly_cost")}),
                Check("licence"),
                End("granted"),
                "full",
                End("on the waiting list"),
            ),
        ),
        "expiry date|licence end": Kind(
            "how soon a licence will expire",
            (
                "when [does|will] {id} expire",
                "how soon will {id} expire",
                "[please|] tell me when {id} will expire",
            ),
            "licence",
            (Read("licence"), End("it ends in", "licence.days_to_expiry")),
        ),
    },
    opening=(
        Read("employee"),
        Stop("callback refused", Is("employee.callback", "refused", likely=0.05)),
    ),
)
