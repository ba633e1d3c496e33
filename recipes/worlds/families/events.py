"""Events: bookings of halls, with crowd limits, deposits, cancellation windows, age limits and catering."""

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

FAMILY = Family(
    name="events",
    places="[the bookings office|the events desk] of [a hotel|a museum|a conference center|a theater]",
    requester="guest",
    records={
        "guest|organizer|patron": Record(
            {
                "sector|clientele|audience": Word("private|company|charity|school"),
                "visits|past_visits|stays": Number(0, 30),
                "credit|solvency|payment_record": Word("good|fair|poor"),
            }
        ),
        "booking|reservation|event": Record(
            {
                "guest": Ref("guest"),
                "hall": Ref("hall"),
                "party|headcount|heads": Number(20, 400),
                "days_ahead|lead_days|days_to_event": Number(0, 120),
                "advance|deposit_paid|paid_ahead": Number(0, 1200),
                "event_date|held_on|day_of_event": Number(20, 330, day=True),
                "occasion|event_type|format": Word("wedding|concert|seminar|banquet|market"),
                "youngest|lowest_age|min_age": Number(0, 30),
                "status|state": Word("held|confirmed|waiting|cancelled"),
                "stage|phase": Word("held|confirmed|waiting|cancelled"),
            }
        ),
        "hall|room|venue": Record(
            {
                "places|capacity|seating": Number(40, 500),
                "floor|storey|deck": Word("ground|upper|garden|cellar"),
                "readiness|upkeep|shape": Word("ready|closed|repair|cleaning"),
            }
        ),
        "menu|buffet|dinner": Record(
            {
                "booking": Ref("booking"),
                "portions|covers|plates": Number(10, 300),
                "diet|cuisine|kitchen_style": Word("vegan|halal|kosher|fish|mixed"),
                "prep_days|days_notice|kitchen_days": Number(0, 30),
                "selection|dish_list|courses": Word("open|final|changed"),
            }
        ),
    },
    rules={
        "crowd limit|fire limit": Limit(60, 300, 20, by="hall.floor"),
        "free window|cancellation window": Limit(7, 60, rare="booking.occasion"),
        "barred occasion|refused occasion": Choice(of="booking.occasion"),
        "deciding field|field to trust": Choice(fields=("booking.status", "booking.stage")),
        "caterer|cooking partner": Choice("harvest|bistro|orchard|saffron", by="menu.diet", missing=0.3),
        "deposit|security": Limit(100, 900, 50, by="booking.occasion"),
        "deposit method|security method": Choice("card|transfer|waived"),
        "entry age|age limit": Limit(6, 21),
        "season end|closing day": Limit(120, 300, day=True),
        "trusted sector|favored sector": Choice(of="guest.sector"),
        "duty officer|officer in charge": Choice("captain|manager|director|warden"),
        "kitchen notice|kitchen lead": Limit(4, 14),
        "regular mark|loyalty mark": Limit(6, 20, 2),
    },
    actions={
        "confirm|secure|accept": Action("booking", sets={"status": "confirmed"}),
        "charge|debit|collect": Action(
            "booking", {"sum|value": Number(1, 9999), "way|means": Word("card")}, {"stage": "charged"}
        ),
        "cancel|release|drop": Action("booking", sets={"status": "cancelled"}),
        "refund|pay_back|reimburse": Action("booking", {"amount|money": Number(0, 9999)}),
        "permit|waive|exempt": Action(
            "booking", {"officer|asked_of": Word("warden")}, gives={"answer|verdict|ruling": Word("yes|no")}
        ),
        "reschedule|shift|move": Action("booking", {"days|offset": Number(1, 99)}, {"stage": "moved"}),
        "enlarge|expand|grow": Action("booking", {"extra|newcomers": Number(1, 99)}, {"stage": "enlarged"}),
        "cater|engage|commission": Action(
            "menu", {"house|provider": Word("bistro"), "servings|meals": Number(1, 999)}, {"selection": "ordered"}
        ),
        "close|shut|seal_off": Action("hall", sets={"readiness": "closed"}),
    },
    kinds={
        "confirmation|fixing": Kind(
            "bookings to confirm",
            (
                "[please|] confirm {id} [for us|this week]",
                "I [want|would like] to confirm {id}",
                "can you confirm {id} [today|now|this week]",
            ),
            "booking",
            (
                Read("booking"),
                Stop("refused, barred occasion", Is("booking.occasion", rule="barred occasion", likely=0.15)),
                Stop("after the season", Over("booking.event_date", "season end", likely=0.2)),
                Read("hall", by="booking.hall"),
                Stop("hall not ready", Is("hall.readiness", "ready", likely=0.8), unless=True),
                Jump("fits", Over("booking.party", "crowd limit", likely=0.35), unless=True),
                Do("permit", {"officer": By("duty officer")}),
                Stop("party too large", Is("permit.answer", "yes", likely=0.65), unless=True),
                "fits",
                Jump("secure", Says("deposit method", "waived")),
                Jump("secure", Is("guest.sector", rule="trusted sector", likely=0.3)),
                Jump("secure", Over("booking.advance", "deposit", likely=0.5)),
                Do("charge", {"sum": By("deposit"), "way": By("deposit method")}),
                Check("booking"),
                "secure",
                Do("confirm"),
                End("confirmed"),
            ),
        ),
        "cancellation|calling off": Kind(
            "bookings to cancel",
            (
                "[please|] cancel {id} [for us|at once]",
                "we [have|want] to cancel {id}",
                "cancel {id}, [our plans changed|I am ill]",
            ),
            "booking",
            (
                Read("booking"),
                Stop("cancelled before", Counts("deciding field", "cancelled", likely=0.2)),
                Do("cancel"),
                Check("booking"),
                Stop("deposit is kept", Over("booking.days_ahead", "free window", likely=0.6), unless=True),
                Do("refund", {"amount": Of("booking.advance")}),
                End("deposit paid back", "booking.advance"),
            ),
        ),
        "new date|later date": Kind(
            "bookings to postpone",
            (
                "postpone {id} by {days} days",
                "[please|] postpone {id}, {days} days later [is fine|would do]",
                "we [must|want to] postpone {id} by {days} days",
            ),
            "booking",
            (
                Read("booking"),
                Stop("cancelled before", Counts("deciding field", "cancelled", likely=0.2)),
                Jump("free", Over("booking.days_ahead", "free window", likely=0.55)),
                Do("permit", {"officer": By("duty officer")}),
                Stop("too close", Is("permit.answer", "yes", likely=0.5), unless=True),
                "free",
                Do("reschedule", {"days": Asked("days")}),
                Check("booking"),
                End("postponed"),
            ),
            {"days": Number(2, 60)},
        ),
        "larger party|growth": Kind(
            "guests to add to a booking",
            (
                "add {extra} guests to {id}",
                "[we bring|there will be] {extra} further guests at {id}",
                "[please|] put {extra} more guests on {id}",
            ),
            "booking",
            (
                Read("booking"),
                Stop("too close", Over("booking.days_ahead", "free window", likely=0.75), unless=True),
                Read("hall", by="booking.hall"),
                Stop("hall is closed", Is("hall.readiness", "closed", likely=0.2)),
                Stop("crowd too large", Over("booking.party", "crowd limit", likely=0.3)),
                Do("enlarge", {"extra": Asked("extra")}),
                Check("booking"),
                End("guests added"),
            ),
            {"extra": Number(2, 40)},
        ),
        "catering|food": Kind(
            "meals to arrange",
            (
                "arrange the [meals|food] of {id}",
                "[please|] arrange {id} [for us|in time]",
                "we [need|want] the meals in {id}",
            ),
            "menu",
            (
                Read("menu"),
                Stop("menu not final", Is("menu.selection", "final", likely=0.8), unless=True),
                Stop("nobody cooks it", Says("caterer", "none")),
                Stop("too late", Over("menu.prep_days", "kitchen notice", likely=0.75), unless=True),
                Read("booking", by="menu.booking"),
                Stop("booking not confirmed", Counts("deciding field", "confirmed", likely=0.75), unless=True),
                Do("cater", {"house": By("caterer"), "servings": Of("menu.portions")}),
                Check("menu"),
                End("caterer engaged", "menu.portions"),
            ),
        ),
        "age question|young visitors": Kind(
            "whether minors may come",
            ("are minors [allowed|welcome] at {id}", "we [bring|have] minors at {id}", "can minors join {id}"),
            "booking",
            (
                Read("booking"),
                Jump("welcome", Over("booking.youngest", "entry age", likely=0.45)),
                Stop("too young", Is("booking.occasion", "concert", likely=0.25)),
                Do("permit", {"officer": By("duty officer")}),
                Stop("not let in", Is("permit.answer", "yes", likely=0.5), unless=True),
                "welcome",
                End("all may come", "booking.youngest"),
            ),
        ),
        "prepayment|down payment": Kind(
            "a deposit to pay",
            (
                "[take|collect] the deposit [for|of] {id}",
                "I want to [pay|settle] the deposit of {id}",
                "[here is|please take] our deposit for {id}",
            ),
            "booking",
            (
                Read("booking"),
                Stop("none needed", Says("deposit method", "waived")),
                Stop("paid before", Over("booking.advance", "deposit", likely=0.4)),
                Do("charge", {"sum": By("deposit"), "way": By("deposit method")}),
                Check("booking"),
                End("charged"),
            ),
        ),
        "damage|fault": Kind(
            "broken things in a hall",
            (
                "something is broken in {id}",
                "{id} has a broken [door|window|light]",
                "the [heating|ceiling] of {id} is broken",
            ),
            "hall",
            (
                Read("hall"),
                Stop("closed before", Is("hall.readiness", "closed", likely=0.25)),
                Stop("under repair", Is("hall.readiness", "repair", likely=0.25)),
                Do("close"),
                Check("hall"),
                End("hall closed"),
            ),
        ),
        "size|room size": Kind(
            "how many people fit in a hall",
            ("how many people fit in {id}", "[say|tell me] how many people {id} holds", "do 90 people fit in {id}"),
            "hall",
            (Read("hall"), End("it holds", "hall.places")),
        ),
        "countdown|time left": Kind(
            "days until an event",
            ("how many days until {id}", "[count|tell me] the days until {id}", "is it long until {id}"),
            "booking",
            (Read("booking"), End("days to go", "booking.days_ahead")),
        ),
    },
    opening=(
        Read("guest"),
        Jump("known", Over("guest.visits", "regular mark", likely=0.5)),
        Stop("credit is poor", Is("guest.credit", "poor", likely=0.1)),
        "known",
    ),
)
