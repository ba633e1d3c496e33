"""Access: rights to systems are given, extended and revoked, by sensitivity, training, owners and time."""

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

REVOKE = (Do("revoke"), Check("grant"))

FAMILY = Family(
    name="access",
    places="the [access desk|identity team|security office] of [a bank|an insurer|a research institute|a port]",
    requester="employee",
    records={
        "employee|colleague|worker": Record(
            {
                "contract|employment|hire_type": Word("permanent|temporary|external"),
                "training_age|course_age|days_since_course": Number(0, 400),
                "badge|badge_state|pass_state": Word("active|lost|expired"),
                "office|branch|site": Word("tower|annex|harbor|campus"),
            }
        ),
        "role|profile|permission": Record(
            {
                "system": Ref("system"),
                "sensitivity|risk_level|secrecy": Word("public|internal|secret|critical"),
                "area|domain|subject": Word("payroll|sales|research|claims|network"),
                "conflict|duty_conflict|clash_check": Word("clear|minor|severe"),
                "holders|seats_taken|member_count": Number(1, 60),
            }
        ),
        "grant|entitlement|assignment": Record(
            {
                "employee": Ref("employee"),
                "role": Ref("role"),
                "state|grant_state": Word("active|paused|ended"),
                "sync_state|directory_state": Word("active|paused|ended"),
                "days_left|remaining_days|days_to_run": Number(0, 120),
                "idle_days|days_unused|quiet_days": Number(0, 120),
                "extensions|renewals|times_renewed": Number(0, 12),
            }
        ),
        "system|application|platform": Record(
            {
                "mode|service_mode|running_mode": Word("normal|frozen|retired"),
                "zone|network_zone|segment": Word("inner|cloud|factory|partner"),
                "sign_in|login_state|lock_state": Word("open|locked|disabled"),
                "failed_logins|bad_attempts|failures": Number(0, 15),
            }
        ),
    },
    rules={
        "course validity|training window": Limit(60, 360, 10, by="role.sensitivity"),
        "idle limit|unused limit|quiet limit": Limit(20, 100, 5, rare="role.area"),
        "owner desk|owning team|role owner": Choice(
            "finance|security|personnel|engineering", by="role.area", missing=0.3
        ),
        "closed class|barred class": Choice(of="role.sensitivity"),
        "outsiders|external staff": Choice("allowed|watched|forbidden"),
        "true state|state that counts": Choice(fields=("grant.state", "grant.sync_state")),
        "extension cap|renewal cap": Limit(4, 10),
        "seat limit|holder limit": Limit(10, 50, 5),
        "lockout mark|attempt limit": Limit(4, 12),
        "directory|identity store": Choice("forest|atlas|nimbus|orchard"),
        "access days|access period|usual duration": Limit(7, 90, by="employee.contract"),
    },
    actions={
        "assign|give|attach": Action("role", {"days|length": Number(1, 99), "target|registry": Word("atlas")}),
        "ask_owner|seek_consent|consult_owner": Action(
            "role", {"team|desk": Word("finance")}, gives={"answer|verdict|consent": Word("yes|no")}
        ),
        "extend|prolong|renew": Action("grant", {"days|length": Number(1, 99)}),
        "revoke|remove|withdraw": Action("grant", sets={"state": "ended"}),
        "pause|suspend|freeze": Action("grant", sets={"state": "paused"}),
        "unlock|release|reset_lock": Action("system", sets={"sign_in": "open"}),
        "enroll|book_course|send_to_course": Action("employee", {"topic|lesson": Word("ethics")}),
        "notify|message|inform": Action("employee", {"text|note": Word("x")}),
        "log_review|record_audit": Action("system", {"text|note": Word("x")}),
    },
    kinds={
        "role application|new access": Kind(
            "a request for new rights",
            (
                "I [need|would like|want] the rights of {id}",
                "[please|could you] give me the rights of {id}",
                "I request {id} [for my work|for a new project]",
                "my request is [access to|] {id} [for my work|please]",
            ),
            "role",
            (
                Read("role"),
                Stop("denied, closed class", Is("role.sensitivity", rule="closed class", likely=0.15)),
                Stop("denied, duty conflict", Is("role.conflict", "severe", likely=0.15)),
                Jump("trained", Over("employee.training_age", "course validity"), unless=True),
                Do("enroll", {"topic": Of("role.area")}),
                End("course comes first", "role.area"),
                "trained",
                Jump("inside", Is("employee.contract", "external"), unless=True),
                Stop("denied to outsiders", Says("outsiders", "forbidden")),
                "inside",
                Jump("give", Is("role.sensitivity", "public", likely=0.35)),
                Stop("no owner known", Says("owner desk", "none")),
                Do("ask_owner", {"team": By("owner desk")}),
                Stop("owner said no", Is("ask_owner.answer", "yes", likely=0.75), unless=True),
                "give",
                Do("assign", {"days": By("access days"), "target": By("directory")}),
                End("role assigned"),
            ),
        ),
        "extension|prolongation": Kind(
            "to extend a grant, to have it longer",
            (
                "[please|kindly] extend {id} by {days} days",
                "I need {id} [for|another] {days} days longer",
                "[can|could] you extend {id} by {days} days",
            ),
            "grant",
            (
                Read("grant"),
                Stop("not active", Counts("true state", "active", likely=0.75), unless=True),
                Stop("extended too often", Over("grant.extensions", "extension cap", likely=0.3)),
                Read("role", "grant.role"),
                Stop("training too old", Over("employee.training_age", "course validity")),
                Do("extend", {"days": Asked("days")}),
                Check("grant"),
                End("extension granted"),
            ),
            {"days": Number(5, 60)},
        ),
        "revocation|removal": Kind(
            "a grant to revoke or surrender",
            (
                "[please|kindly] revoke {id} [today|at once]",
                "{id} [is not needed|can go], [please|] revoke it",
                "I [want to|hereby|will] surrender {id}",
            ),
            "grant",
            (
                Read("grant"),
                Stop("ended before", Counts("true state", "ended", likely=0.3)),
                *REVOKE,
                End("revoked"),
            ),
        ),
        "usage review|sleeping access": Kind(
            "grants that lie idle or unused",
            (
                "{id} has been idle [for weeks|lately|for long]",
                "[please|] review {id}, it seems unused",
                "nobody works with {id}, it lies idle",
                "[look at|check] {id}, [probably|perhaps] unused",
            ),
            "grant",
            (
                Read("grant"),
                Read("role", "grant.role"),
                Stop("still in use", Over("grant.idle_days", "idle limit", likely=0.7), unless=True),
                Jump("cut", Is("role.sensitivity", "critical", likely=0.4)),
                Do("pause"),
                Check("grant"),
                End("paused"),
                "cut",
                *REVOKE,
                End("cut off"),
            ),
        ),
        "sign in trouble|lockout": Kind(
            "a login that is locked",
            (
                "I am locked out of {id}",
                "my login [on|to|for] {id} [fails|is blocked]",
                "{id} [has|] locked me out [again|]",
            ),
            "system",
            (
                Read("system"),
                Stop("system is retired", Is("system.mode", "retired", likely=0.15)),
                Stop("not locked", Is("system.sign_in", "locked", likely=0.8), unless=True),
                Stop("too many failures", Over("system.failed_logins", "lockout mark", likely=0.3)),
                Do("unlock"),
                Check("system"),
                End("unlocked"),
            ),
        ),
        "schooling|enrollment": Kind(
            "a course or lesson to attend",
            (
                "[please|kindly] book me the {course} course",
                "I [must|want to|have to] attend the {course} course",
                "[please|] put me down for a lesson in {course}",
            ),
            "employee",
            (
                Stop("outsiders not taught", Is("employee.contract", "external")),
                Do("enroll", {"topic": Asked("course")}),
                End("enrolled"),
            ),
            {"course": Word("privacy|safety|ethics|conduct")},
        ),
        "vacancy|room for more": Kind(
            "whether seats of a role are free",
            (
                "are [any|some|more] seats left on {id}",
                "does {id} have [free|open|more] seats",
                "how many seats [has|does] {id} [have|offer]",
            ),
            "role",
            (
                Read("role"),
                Jump("full", Over("role.holders", "seat limit", likely=0.45)),
                End("seats free", "role.holders"),
                "full",
                End("fully taken", "role.holders"),
            ),
        ),
        "time left|remaining time": Kind(
            "when a grant will expire",
            (
                "[tell me|] when does {id} expire",
                "[on what day|how soon] does {id} expire",
                "[please|] say when {id} will expire",
            ),
            "grant",
            (Read("grant"), End("days remaining", "grant.days_left")),
        ),
        "recertification|yearly check": Kind(
            "a grant to certify, the audit",
            (
                "[please|kindly] certify {id} [again|for another year]",
                "{id} is up for the [yearly|next] audit",
                "the audit [asks about|mentions] {id}",
                "[can|could] you certify {id} [again|]",
            ),
            "grant",
            (
                Read("grant"),
                Stop("nothing to keep", Counts("true state", "ended", likely=0.2)),
                Read("role", "grant.role"),
                Jump("drop", Is("role.conflict", "severe", likely=0.2)),
                Jump("drop", Says("owner desk", "none")),
                Do("ask_owner", {"team": By("owner desk")}),
                Jump("drop", Is("ask_owner.answer", "yes", likely=0.65), unless=True),
                Do("extend", {"days": By("access days")}),
                Check("grant"),
                End("certified again"),
                "drop",
                *REVOKE,
                End("dropped"),
            ),
        ),
        "system location|placement": Kind(
            "the zone where a system runs",
            (
                "[tell me|] which zone is {id} in",
                "[please|] tell me the zone of {id}",
                "do you know where {id} runs",
            ),
            "system",
            (Read("system"), End("it runs here", "system.zone")),
        ),
    },
    opening=(
        Read("employee"),
        Jump("inside", Is("employee.contract", "permanent", likely=0.4)),
        Stop("badge not active", Is("employee.badge", "active", likely=0.92), unless=True),
        "inside",
    ),
)
