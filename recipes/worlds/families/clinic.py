"""Clinic: visits by urgency and referral, notice and missed visits, refills with reviews, screening."""

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

BOOK = (
    Do("book", {"urgency": By("urgency table")}),
    Check("appointment"),
)
OWN_DOCTOR = (
    Read("patient", by="prescription.patient"),
    Read("doctor", by="patient.doctor"),
)

FAMILY = Family(
    name="clinic",
    places="[the reception|the front desk|the booking line] of [a clinic|a group practice|a health center]",
    requester="patient",
    records={
        "patient|client": Record(
            {
                "doctor": Ref("doctor"),
                "cover|insurance": Word("public|private|student"),
                "details|contact_details": Word("current|outdated"),
                "age|age_years": Number(1, 95),
                "missed_visits|no_shows": Number(0, 9),
                "consent|consent_form": Word("signed|missing|withdrawn"),
            }
        ),
        "doctor|physician|specialist": Record(
            {
                "branch|specialty": Word("general|skin|heart|eyes|bones"),
                "free_slots|open_slots": Number(0, 24),
                "intake|list_state": Word("open|closed|paused"),
            }
        ),
        "appointment|visit|consultation": Record(
            {
                "patient": Ref("patient"),
                "doctor": Ref("doctor"),
                "reason|complaint": Word("checkup|pain|rash|injury|vaccine"),
                "days_ahead|days_until": Number(0, 60),
                "letter|referral": Word("attached|absent|expired"),
                "stage|desk_state": Word("booked|arrived|seen|missed"),
                "calendar|calendar_state": Word("booked|arrived|seen|missed"),
            }
        ),
        "prescription|medication": Record(
            {
                "patient": Ref("patient"),
                "group|drug_group": Word("heart|sleep|hormone|allergy|antibiotic"),
                "repeats_left|packs_left": Number(0, 12),
                "months_since_review|review_age": Number(0, 24),
                "blood_test|lab_state": Word("fresh|due|missing"),
            }
        ),
    },
    rules={
        "urgency table|urgency list": Choice("routine|soon|today|emergency", by="appointment.reason"),
        "longest wait|wait limit": Limit(5, 40, rare="appointment.reason"),
        "cancel notice|notice days": Limit(4, 10, by="patient.cover"),
        "referral branch|letter branch": Choice(of="doctor.branch"),
        "true calendar|stage that counts": Choice(fields=("appointment.stage", "appointment.calendar")),
        "review desk|review post": Choice("nurse|pharmacist|registrar|matron", by="prescription.group", missing=0.3),
        "review interval|review months": Limit(4, 18, by="prescription.group"),
        "closed group|visit only": Choice(of="prescription.group"),
        "absence limit|missed limit": Limit(4, 7),
        "screening age|recall age": Limit(30, 70, 5),
        "absence fee|missed fee": Limit(15, 60, 5),
        "consent rule|form rule": Choice("strict|lenient"),
    },
    actions={
        "confirm|refresh|update": Action("patient", sets={"details": "current"}),
        "invite|call_in|summon": Action("patient", {"topic|field": Word("heart")}),
        "bill|charge|invoice": Action("patient", {"fee|amount": Number(1, 99)}),
        "book|schedule|slot_in": Action(
            "appointment", {"urgency|priority": Word("soon")}, {"stage": "booked", "calendar": "booked"}
        ),
        "cancel|call_off|drop": Action("appointment", sets={"stage": "cancelled", "calendar": "cancelled"}),
        "assess|triage|screen": Action("appointment", gives={"grade|severity": Word("mild|serious|critical")}),
        "review|appraise|evaluate": Action(
            "prescription", {"desk|reviewer": Word("nurse")}, gives={"verdict|advice": Word("continue|adjust|stop")}
        ),
        "renew|refill|repeat": Action("prescription", {"packs|boxes": Number(1, 9)}),
        "print|print_out": Action("prescription", {"copies|sheets": Number(1, 5)}),
    },
    kinds={
        "new appointment|first booking": Kind(
            "a visit to arrange",
            (
                "[please|] arrange {id} for me",
                "can you arrange {id} [soon|this month]",
                "I would like you to arrange {id}",
            ),
            "appointment",
            (
                Read("appointment"),
                Jump("now", Says("urgency table", "emergency")),
                Read("doctor", by="appointment.doctor"),
                Stop("list is closed", Is("doctor.intake", "closed", likely=0.15)),
                Jump("wait", Is("doctor.branch", rule="referral branch", likely=0.5), unless=True),
                Stop("letter needed", Is("appointment.letter", "attached", likely=0.5), unless=True),
                "wait",
                Stop("wait too long", Over("appointment.days_ahead", "longest wait", likely=0.25)),
                *BOOK,
                End("booked"),
                "now",
                Do("assess"),
                Stop("sent to hospital", Is("assess.grade", "critical", likely=0.4)),
                Do("book", {"urgency": By("urgency table")}),
                End("seen today"),
            ),
        ),
        "cancellation|calling off": Kind(
            "a visit to cancel",
            (
                "[please|] cancel {id} for me",
                "I [have|want] to cancel {id}",
                "I cannot come, cancel {id} [please|]",
            ),
            "appointment",
            (
                Read("appointment"),
                Stop("not booked", Counts("true calendar", "booked", likely=0.8), unless=True),
                Jump("free", Over("appointment.days_ahead", "cancel notice", likely=0.55)),
                Do("bill", {"fee": By("absence fee")}),
                "free",
                Do("cancel"),
                Check("appointment"),
                End("cancelled"),
            ),
        ),
        "sooner visit|bringing forward": Kind(
            "a visit wanted earlier",
            (
                "can {id} be earlier [this month|]",
                "I [need|want] {id} to be earlier",
                "is there anything earlier than {id}",
            ),
            "appointment",
            (
                Read("appointment"),
                Do("assess"),
                Jump("pressing", Is("assess.grade", "mild", likely=0.6), unless=True),
                Stop("wait is acceptable", Over("appointment.days_ahead", "longest wait", likely=0.5), unless=True),
                "pressing",
                Read("doctor", by="appointment.doctor"),
                Stop("no room", Is("doctor.intake", "open", likely=0.7), unless=True),
                *BOOK,
                End("brought forward"),
            ),
        ),
        "missed visit|absence": Kind(
            "someone missed a visit",
            (
                "I missed {id} [yesterday|last week]",
                "sorry, I [have|] missed {id}",
                "what happens now that I missed {id}",
            ),
            "appointment",
            (
                Read("appointment"),
                Stop("nothing recorded", Counts("true calendar", "missed", likely=0.75), unless=True),
                Stop("excused", Is("appointment.reason", "injury", likely=0.2)),
                Jump("often", Over("patient.missed_visits", "absence limit", likely=0.4)),
                End("warned only"),
                "often",
                Do("bill", {"fee": By("absence fee")}),
                End("fee charged"),
            ),
        ),
        "letter question|letter check": Kind(
            "whether a referral is needed",
            (
                "do I need a referral for {id}",
                "is a referral [needed|required] for {id}",
                "[please|] tell me if {id} takes a referral",
            ),
            "appointment",
            (
                Read("appointment"),
                Read("doctor", by="appointment.doctor"),
                Jump("must", Is("doctor.branch", rule="referral branch", likely=0.65)),
                End("no letter needed"),
                "must",
                Jump("have", Is("appointment.letter", "attached", likely=0.4)),
                End("bring a letter"),
                "have",
                End("letter is here"),
            ),
        ),
        "repeat prescription|more medicine": Kind(
            "medicine to refill",
            (
                "[please|] refill {id} with {packs} packs",
                "I need {packs} packs of {id}, please refill it",
                "can you refill {id}, {packs} packs",
            ),
            "prescription",
            (
                Read("prescription"),
                Stop("see the doctor", Is("prescription.group", rule="closed group", likely=0.2)),
                Stop("blood test first", Is("prescription.blood_test", "missing", likely=0.15)),
                Jump("renew", Over("prescription.months_since_review", "review interval", likely=0.6), unless=True),
                Jump("doctor", Says("review desk", "none")),
                Do("review", {"desk": By("review desk")}),
                Jump("renew", Is("review.verdict", "continue", likely=0.5)),
                End("review says no"),
                "doctor",
                *OWN_DOCTOR,
                Stop("doctor is away", Is("doctor.intake", "paused", likely=0.3)),
                "renew",
                Do("renew", {"packs": Asked("packs")}),
                Check("prescription"),
                End("refilled"),
            ),
            {"packs": Number(1, 4)},
        ),
        "side effects|bad reaction": Kind(
            "side effects of a medicine",
            (
                "{id} gives me side effects",
                "I [have|get] bad effects from {id}",
                "are there [known|any] side effects of {id}",
            ),
            "prescription",
            (
                Read("prescription"),
                Jump("nobody", Says("review desk", "none")),
                Do("review", {"desk": By("review desk")}),
                Stop("stop taking it", Is("review.verdict", "stop", likely=0.35)),
                End("keep taking it"),
                "nobody",
                *OWN_DOCTOR,
                Do("invite", {"topic": Of("doctor.branch")}),
                End("invited to a visit"),
            ),
        ),
        "recall|prevention": Kind(
            "a screening that is due",
            (
                "am I due for [a|the next] screening",
                "[please|] sign me up for the screening",
                "I would like to have a screening",
            ),
            "patient",
            (
                Read("patient"),
                Stop("too young", Over("patient.age", "screening age", likely=0.6), unless=True),
                Jump("invite", Says("consent rule", "lenient")),
                Stop("form not signed", Is("patient.consent", "signed", likely=0.6), unless=True),
                "invite",
                Read("doctor", by="patient.doctor"),
                Do("invite", {"topic": Of("doctor.branch")}),
                End("invited"),
            ),
        ),
        "change of doctor|other doctor": Kind(
            "a doctor to switch to",
            (
                "I [want|would like] to switch to {id}",
                "can I switch to {id} [next month|]",
                "[please|] let me switch to {id}",
            ),
            "doctor",
            (
                Read("doctor"),
                Stop("list is full", Is("doctor.intake", "open", likely=0.7), unless=True),
                Stop("too many absences", Over("patient.missed_visits", "absence limit", likely=0.3)),
                Do("invite", {"topic": Of("doctor.branch")}),
                End("welcome"),
            ),
        ),
        "free slots|openings": Kind(
            "how busy a doctor is",
            (
                "how busy is {id} [this week|]",
                "is {id} [very|] busy this week",
                "[please|] tell me how busy {id} is",
            ),
            "doctor",
            (Read("doctor"), End("free slots", "doctor.free_slots")),
        ),
    },
    opening=(
        Read("patient"),
        Jump("current", Is("patient.details", "current", likely=0.85)),
        Do("confirm"),
        "current",
    ),
)
