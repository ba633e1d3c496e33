"""Travel: trips are moved, cancelled and made good, by fare, days to departure, seats and operator."""

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

FEE = (
    Jump("free", Is("traveler.membership", rule="waiver level", likely=0.3)),
    Do("charge", {"amount": By("change fee")}),
    "free",
)
PAYOUT = (
    Jump("pay", Over("booking.price_paid", "payout ceiling", likely=0.5), unless=True),
    Do("consent", {"officer": By("duty officer")}),
    Stop("turned down", Is("consent.reply", "yes", likely=0.6), unless=True),
    "pay",
    Do("refund", {"amount": Of("booking.price_paid")}),
    Check("booking"),
    End("paid back", "booking.price_paid"),
)

FAMILY = Family(
    name="travel",
    places="[the changes desk|the aftersales team|the service line] of [an airline|a railway|a bus line|a ferry line]",
    requester="traveler",
    records={
        "traveler|passenger|guest": Record(
            {
                "membership|loyalty_level": Word("blue|bronze|platinum"),
                "contact|contact_state": Word("confirmed|bounced"),
                "papers|travel_papers": Word("valid|expired|missing"),
                "points|miles": Number(0, 900),
            }
        ),
        "booking|reservation|ticket": Record(
            {
                "traveler": Ref("traveler"),
                "journey": Ref("journey"),
                "fare|fare_class": Word("saver|basic|flexible|premium"),
                "price_paid|ticket_price": Number(30, 900),
                "days_left|days_to_departure": Number(0, 60),
                "payment|payment_state": Word("settled|pending|disputed|reversed"),
                "ledger|bank_state": Word("settled|pending|disputed|reversed"),
                "stage|travel_stage": Word("held|ticketed|boarded"),
            }
        ),
        "journey|departure|connection": Record(
            {
                "seats_left|vacant_seats": Number(0, 40),
                "minutes_late|delay_minutes": Number(0, 360),
                "operation|running_state": Word("planned|delayed|cancelled"),
                "operator|carrier": Word("coastal|northern|alpine|metro"),
                "cause|trouble": Word("weather|strike|technical|crew"),
            }
        ),
        "voucher|coupon": Record(
            {
                "traveler": Ref("traveler"),
                "balance|remaining_value": Number(10, 500),
                "months_old|voucher_age": Number(0, 36),
                "issued_on|voucher_date": Number(0, 340, day=True),
                "origin|issued_for": Word("gift|refund|apology"),
                "usage|usage_state": Word("unused|partial|spent"),
            }
        ),
    },
    rules={
        "change fee|rebooking fee": Limit(10, 120, 5, by="booking.fare"),
        "notice days|cutoff days": Limit(4, 21, rare="booking.fare"),
        "payout form|payback form": Choice("cash|credit"),
        "payment source|trusted ledger": Choice(fields=("booking.payment", "booking.ledger")),
        "late mark|claim minutes": Limit(45, 180, 15, by="journey.operator"),
        "excused cause|pardoned cause": Choice(of="journey.cause", by="journey.operator"),
        "partner desk|sister desk": Choice("harbor|terminal|annex|tower", by="journey.operator", missing=0.4),
        "payout ceiling|agent ceiling": Limit(100, 700, 50),
        "seat buffer|seats kept": Limit(4, 12),
        "scheme change|new scheme day": Limit(60, 320, day=True),
        "waiver level|free level": Choice(of="traveler.membership"),
        "duty officer|second signature": Choice("supervisor|purser|controller|director"),
        "voucher months|voucher life": Limit(6, 24, 3),
    },
    actions={
        "rebook|move|shift": Action("booking", {"day|weekday": Word("monday")}, {"stage": "moved"}),
        "charge|bill|debit": Action("booking", {"amount|sum": Number(1, 999)}),
        "refund|pay_back|reimburse": Action(
            "booking", {"amount|sum": Number(1, 999)}, {"payment": "reversed", "ledger": "reversed"}
        ),
        "consent|clearance|sign_off": Action(
            "booking", {"officer|by": Word("purser")}, gives={"reply|verdict": Word("yes|no")}
        ),
        "amend|correct|edit": Action("booking", {"detail|entry": Word("suite")}, {"stage": "amended"}),
        "credit|compensate": Action("traveler", {"amount|sum": Number(1, 999)}),
        "notify|message|inform": Action("traveler", {"topic|subject": Word("weather")}),
        "forward|pass_on|relay": Action("journey", {"desk|office": Word("annex")}),
        "prolong|renew|lengthen": Action("voucher", {"months|duration": Number(1, 48)}, {"usage": "renewed"}),
    },
    kinds={
        "date change|new day": Kind(
            "a trip to move to another day",
            (
                "[please|] move {id} to {day}",
                "can you move {id} to {day} [instead|]",
                "I have to move my trip {id} to {day}",
            ),
            "booking",
            (
                Read("booking"),
                Stop("already on board", Is("booking.stage", "boarded", likely=0.1)),
                Stop("too late to change", Over("booking.days_left", "notice days", likely=0.75), unless=True),
                Stop("not paid for", Counts("payment source", "settled", likely=0.8), unless=True),
                Read("journey", by="booking.journey"),
                Stop("no seat free", Over("journey.seats_left", "seat buffer", likely=0.75), unless=True),
                *FEE,
                Do("rebook", {"day": Asked("day")}),
                Check("booking"),
                End("moved"),
            ),
            {"day": Word("monday|tuesday|thursday|friday|saturday|sunday")},
        ),
        "cancellation|calling off": Kind(
            "a booking to cancel",
            (
                "[please|] cancel {id} for me",
                "I [want|would like] to cancel {id}",
                "we cannot go, cancel {id} [please|]",
            ),
            "booking",
            (
                Read("booking"),
                Stop("already on board", Is("booking.stage", "boarded", likely=0.1)),
                Jump("late", Over("booking.days_left", "notice days", likely=0.7), unless=True),
                Jump("credit", Says("payout form", "credit")),
                *PAYOUT,
                "late",
                Stop("saver fare lost", Is("booking.fare", "saver", likely=0.4)),
                "credit",
                Do("credit", {"amount": Of("booking.price_paid")}),
                End("credited"),
            ),
        ),
        "disruption claim|damages": Kind(
            "compensation for trouble on the way",
            (
                "[please|] pay me compensation for {id}",
                "I [claim|ask for] compensation for {id}",
                "what compensation do I get for {id}",
            ),
            "booking",
            (
                Read("booking"),
                Read("journey", by="booking.journey"),
                Jump("off", Is("journey.operation", "cancelled", likely=0.35)),
                Stop("delay too short", Over("journey.minutes_late", "late mark", likely=0.7), unless=True),
                Stop("excused by its cause", Is("journey.cause", rule="excused cause", likely=0.25)),
                Do("credit", {"amount": Of("booking.price_paid")}),
                End("credited"),
                "off",
                *PAYOUT,
            ),
        ),
        "grievance|bad service": Kind(
            "a complaint about the service on board",
            (
                "I have a complaint about {id}",
                "complaint: {id} was [dirty|too hot|very loud]",
                "[please|] take down my complaint on {id}",
            ),
            "journey",
            (
                Read("journey"),
                Jump("own", Says("partner desk", "none")),
                Do("forward", {"desk": By("partner desk")}),
                End("passed to the partner"),
                "own",
                Stop("noted, no action", Is("journey.cause", rule="excused cause", likely=0.4)),
                Do("notify", {"topic": Of("journey.cause")}),
                End("answered"),
            ),
        ),
        "better cabin|cabin choice": Kind(
            "an upgrade to another cabin",
            (
                "upgrade {id} to [the|] {cabin} [please|]",
                "can I get an upgrade of {id} to {cabin}",
                "I want an upgrade to {cabin} on {id}",
            ),
            "booking",
            (
                Read("booking"),
                Read("journey", by="booking.journey"),
                Stop("not running", Is("journey.operation", "cancelled", likely=0.15)),
                Stop("fully booked", Over("journey.seats_left", "seat buffer", likely=0.7), unless=True),
                *FEE,
                Do("amend", {"detail": Asked("cabin")}),
                Check("booking"),
                End("upgraded"),
            ),
            {"cabin": Word("lounge|sleeper|panorama|suite")},
        ),
        "spelling|correction": Kind(
            "a name that is wrong",
            (
                "the name on {id} must be {name}",
                "[please|] correct the name on {id} to {name}",
                "my name on {id} should be {name}",
            ),
            "booking",
            (
                Read("booking"),
                Stop("papers come first", Is("traveler.papers", "missing", likely=0.3)),
                Do("amend", {"detail": Asked("name")}),
                Check("booking"),
                End("corrected"),
            ),
            {"name": Word("miller|garcia|novak|tanaka|okafor")},
        ),
        "voucher renewal|longer voucher": Kind(
            "a voucher to prolong",
            (
                "[please|] prolong {id} for me",
                "can you prolong {id} [a little|]",
                "I could not use {id}, [please|] prolong it",
            ),
            "voucher",
            (
                Read("voucher"),
                Stop("already spent", Is("voucher.usage", "spent", likely=0.2)),
                Stop("under the new scheme", Over("voucher.issued_on", "scheme change", likely=0.2)),
                Stop("gifts stay as they are", Is("voucher.origin", "gift", likely=0.25)),
                Stop("still good", Over("voucher.months_old", "voucher months", likely=0.7), unless=True),
                Do("prolong", {"months": By("voucher months")}),
                Check("voucher"),
                End("prolonged"),
            ),
        ),
        "voucher value|remaining worth": Kind(
            "what a voucher is still worth",
            (
                "how much is {id} [still|] worth",
                "what is {id} worth [now|today]",
                "tell me what {id} is worth",
            ),
            "voucher",
            (Read("voucher"), End("it holds", "voucher.balance")),
        ),
        "money received|account check": Kind(
            "whether a payment came in",
            (
                "has my payment for {id} [arrived|come in]",
                "[please|] check the payment for {id}",
                "did you get the payment for {id}",
            ),
            "booking",
            (
                Read("booking"),
                Jump("fine", Counts("payment source", "settled", likely=0.5)),
                Stop("bank disputes it", Counts("payment source", "disputed", likely=0.35)),
                Do("notify", {"topic": Of("booking.stage")}),
                End("not yet in"),
                "fine",
                End("all settled"),
            ),
        ),
        "delay news|punctuality": Kind(
            "how late a departure is",
            (
                "how late is {id} [today|]",
                "is {id} [running|] late today",
                "[do you know|tell me] how late {id} is",
            ),
            "journey",
            (
                Read("journey"),
                Jump("off", Is("journey.operation", "cancelled", likely=0.3)),
                End("minutes late", "journey.minutes_late"),
                "off",
                End("it is cancelled"),
            ),
        ),
    },
    opening=(
        Read("traveler"),
        Jump("reached", Is("traveler.contact", "bounced", likely=0.1), unless=True),
        Do("notify", {"topic": Of("traveler.papers")}),
        "reached",
    ),
)
