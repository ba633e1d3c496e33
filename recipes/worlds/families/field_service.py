"""Field service: technicians are sent out to machines, within warranty, skill, parts, distance and hours."""

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

STOCK = Word("present|ordered|absent")
DAYS = Word("monday|tuesday|wednesday|thursday|friday")

BILL = (
    Jump("billed", Says("call charge", "waive")),
    Jump("billed", Over("customer.calls_used", "included calls"), unless=True),
    Do("bill", {"charge": By("trip fee")}),
    "billed",
)

FAMILY = Family(
    name="field_service",
    places="[the dispatch desk of|a service centre of] [a heating company|an appliance maker|a machine builder]",
    requester="customer",
    records={
        "customer|household|subscriber": Record(
            {
                "contract|plan|cover": Word("basic|plus|premium"),
                "billing|balance_state": Word("clear|overdue|blocked"),
                "zone|territory": Word("north|south|coast|valley"),
                "calls_used|visits_used": Number(0, 12),
            }
        ),
        "machine|appliance|installation": Record(
            {
                "customer": Ref("customer"),
                "family|product_line": Word("boiler|heatpump|freezer|washer|lift"),
                "age_months|months_old": Number(0, 90),
                "hazard|danger": Word("gas|current|leak|nothing"),
                "past_repairs|repair_count": Number(0, 16),
                "book_value|rest_value": Number(50, 900),
            }
        ),
        "technician|engineer|fitter": Record(
            {
                "skill|grade": Word("junior|regular|senior|master"),
                "duty|shift": Word("early|late|night|leave"),
                "day_load|jobs_today": Number(0, 12),
            }
        ),
        "job|callout|visit": Record(
            {
                "customer": Ref("customer"),
                "machine": Ref("machine"),
                "technician": Ref("technician"),
                "distance|travel_km": Number(2, 120),
                "quote|estimate|labour_sum": Number(40, 900),
                "urgency|priority": Word("low|normal|high|critical"),
                "part_group|part_needed": Word("pump|board|valve|motor|seal"),
                "van_stock|van_part": STOCK,
                "depot_stock|depot_part": STOCK,
                "days_left|days_until": Number(0, 30),
                "progress|phase": Word("open|planned|done|cancelled"),
            }
        ),
    },
    rules={
        "warranty months|warranty term": Limit(12, 60, 6, by="machine.family"),
        "travel limit|service radius": Limit(15, 90, 5, rare="job.urgency"),
        "expert grade|top grade": Choice(of="technician.skill"),
        "stock record|record that counts": Choice(fields=("job.van_stock", "job.depot_stock")),
        "crew|service crew": Choice("falcon|heron|osprey|kestrel", by="machine.family", missing=0.25),
        "call charge|fee policy": Choice("charge|waive"),
        "included calls|free calls": Limit(4, 9, by="customer.contract"),
        "quote ceiling|cost ceiling": Limit(100, 700, 50),
        "approver|cost owner": Choice("dispatcher|supervisor|planner|controller"),
        "load limit|daily limit": Limit(4, 9),
        "trip fee|callout fee": Limit(20, 95, 5),
        "repair ceiling|repair limit": Limit(4, 12),
    },
    actions={
        "assign|dispatch|allot": Action("job", {"team|squad": Word("falcon")}, {"progress": "planned"}),
        "order_part|procure|requisition": Action(
            "job", {"component|item": Word("pump"), "sponsor|booked_to": Word("planner")}, {"depot_stock": "ordered"}
        ),
        "authorize|clear_costs|endorse": Action(
            "job", {"asked_of|decided_by": Word("planner")}, gives={"ruling|decision": Word("granted|refused|deferred")}
        ),
        "bill|invoice|debit": Action("customer", {"charge|levy": Number(1, 999)}),
        "postpone|put_off|rebook": Action("job", {"new_day|weekday": DAYS}, {"progress": "planned"}),
        "call_off|drop|strike": Action("job", sets={"progress": "cancelled"}),
        "isolate|lock_out|shut_down": Action("machine", sets={"hazard": "isolated"}),
        "send_crew|alert_crew": Action("machine", {"team|squad": Word("falcon")}),
        "reassign|swap|hand_on": Action("job", {"needed_skill|wanted_grade": Word("master")}),
        "retire|write_off|scrap": Action("machine", {"remainder|credit_sum": Number(1, 999)}, {"hazard": "retired"}),
        "survey|rate": Action("customer", {"stars|points": Number(1, 5)}),
    },
    kinds={
        "repair|mending": Kind(
            "a faulty machine to repair on site",
            (
                "[please|] repair what {id} [is about|was opened for]",
                "[please|] get on with the repair under {id}",
                "{id} is for a [faulty|badly faulty] machine, send somebody",
                "when you come for {id}, repair it [at last|for good]",
            ),
            "job",
            (
                Read("job"),
                Stop("not an open job", Is("job.progress", "open", likely=0.8), unless=True),
                Read("machine", by="job.machine"),
                Stop("no crew for it", Says("crew", "none")),
                Jump("covered", Over("machine.age_months", "warranty months", likely=0.6), unless=True),
                Stop("bills are overdue", Is("customer.billing", "overdue")),
                Jump("agreed", Over("job.quote", "quote ceiling", likely=0.5), unless=True),
                Do("authorize", {"asked_of": By("approver")}),
                Stop("costs not granted", Is("authorize.ruling", "granted", likely=0.6), unless=True),
                "agreed",
                Do("bill", {"charge": Of("job.quote")}),
                Do("assign", {"team": By("crew")}),
                Check("job"),
                End("crew sent, at cost", "job.quote"),
                "covered",
                Do("assign", {"team": By("crew")}),
                Check("job"),
                End("crew under warranty"),
            ),
        ),
        "part order|spare part": Kind(
            "spare parts to order for a job",
            (
                "[please|] order the spare [part|] for {id}",
                "the spare for {id} is [missing|not there], get one",
                "{id} needs a spare [part|], [please|] order it",
            ),
            "job",
            (
                Read("job"),
                Stop("already on order", Counts("stock record", "ordered", likely=0.3)),
                Stop("part is there", Counts("stock record", "absent", likely=0.65), unless=True),
                Jump("buy", Over("job.quote", "quote ceiling", likely=0.4), unless=True),
                Do("authorize", {"asked_of": By("approver")}),
                Stop("refused by cost owner", Is("authorize.ruling", "refused", likely=0.3)),
                Stop("decision was deferred", Is("authorize.ruling", "granted", likely=0.65), unless=True),
                "buy",
                Do("order_part", {"component": Of("job.part_group"), "sponsor": By("approver")}),
                Check("job"),
                End("ordered", "job.part_group"),
            ),
        ),
        "emergency|alarm": Kind(
            "an emergency, something dangerous at a machine",
            (
                "emergency at {id}, [come quickly|something is wrong]",
                "{id} looks dangerous, [what now|please help]",
                "[I think|we fear] {id} is dangerous [by now|]",
            ),
            "machine",
            (
                Read("machine"),
                Stop("no danger found", Is("machine.hazard", "nothing", likely=0.3)),
                Do("isolate"),
                Check("machine"),
                Stop("shut down, no crew", Says("crew", "none")),
                Do("send_crew", {"team": By("crew")}),
                End("isolated, crew alerted"),
            ),
        ),
        "other technician|change of hands": Kind(
            "another person to be put on a job, one with more skill",
            (
                "[can|may] [I|we] have another person for {id}",
                "[please|] put another person on {id}",
                "{id} needs someone with more skill",
            ),
            "job",
            (
                Read("job"),
                Stop("job is over", Is("job.progress", "done", likely=0.15)),
                Read("technician", by="job.technician"),
                Jump("swap", Is("technician.duty", "leave", likely=0.25)),
                Jump("swap", Over("technician.day_load", "load limit", likely=0.35)),
                Stop("already an expert", Is("technician.skill", rule="expert grade", likely=0.35)),
                Jump("swap", Is("job.urgency", "critical", likely=0.4)),
                End("no change needed"),
                "swap",
                Do("reassign", {"needed_skill": By("expert grade")}),
                Check("job"),
                End("handed on"),
            ),
        ),
        "postponement|later day": Kind(
            "an agreed date to postpone to a later weekday",
            (
                "[please|] postpone {id} to {day}",
                "[I|we] have to postpone {id}, {day} would be fine",
                "is a later date possible for {id}, such as {day}",
            ),
            "job",
            (
                Read("job"),
                Stop("no date agreed", Is("job.progress", "planned", likely=0.8), unless=True),
                Stop("cannot wait", Is("job.urgency", "critical", likely=0.25)),
                Do("postpone", {"new_day": Asked("day")}),
                Check("job"),
                End("postponed"),
            ),
            {"day": DAYS},
        ),
        "cancellation|calling off": Kind(
            "jobs to cancel because nobody is needed any more",
            (
                "[please|] cancel {id} [for me|for us]",
                "nobody is needed for {id} any more",
                "cancel {id}, [it works again|we mended it ourselves]",
            ),
            "job",
            (
                Read("job"),
                Stop("too late, all done", Is("job.progress", "done", likely=0.2)),
                Do("call_off"),
                Check("job"),
                *BILL,
                End("called off"),
            ),
        ),
        "maintenance|yearly check": Kind(
            "yearly maintenance of a machine",
            (
                "{id} is due for maintenance",
                "[please|] [plan|do] the yearly maintenance of {id}",
                "[can|could] you do the yearly check of {id}",
            ),
            "machine",
            (
                Read("machine"),
                Stop("isolate it first", Is("machine.hazard", "gas", likely=0.2)),
                Stop("worn beyond service", Over("machine.past_repairs", "repair ceiling", likely=0.25)),
                Stop("no crew trained", Says("crew", "none")),
                Jump("free", Is("customer.contract", "premium")),
                *BILL,
                "free",
                Do("send_crew", {"team": By("crew")}),
                End("maintenance is planned"),
            ),
        ),
        "travel question|reach": Kind(
            "whether a place is not too far to travel to",
            (
                "is the travel to {id} too far for you",
                "do you travel as far as {id}",
                "[tell me|please say] whether the travel for {id} is too long",
            ),
            "job",
            (
                Read("job"),
                Jump("far", Over("job.distance", "travel limit", likely=0.5)),
                End("within the radius", "job.distance"),
                "far",
                Stop("out of reach", Says("call charge", "waive")),
                Do("bill", {"charge": By("trip fee")}),
                End("possible, trip charged"),
            ),
        ),
        "arrival|waiting time": Kind(
            "how long until somebody comes, in days",
            (
                "how many days until {id}",
                "[tell me|please say] in how many days {id} is",
                "how many days [is|lies] {id} away",
            ),
            "job",
            (Read("job"), End("days to wait", "job.days_left")),
        ),
        "replacement|trade in": Kind(
            "an old machine to replace and write off",
            (
                "[please|] replace {id} with a new one",
                "{id} is too old, [please|] replace it",
                "[can|will] you replace {id} [soon|this year|]",
            ),
            "machine",
            (
                Read("machine"),
                Stop("still in warranty", Over("machine.age_months", "warranty months", likely=0.7), unless=True),
                Stop("worth another repair", Over("machine.past_repairs", "repair ceiling", likely=0.6), unless=True),
                Do("retire", {"remainder": Of("machine.book_value")}),
                Check("machine"),
                End("written off", "machine.book_value"),
            ),
        ),
    },
    opening=(
        Read("customer"),
        Jump("welcome", Is("customer.contract", "premium", likely=0.3)),
        Stop("account is blocked", Is("customer.billing", "blocked", likely=0.06)),
        "welcome",
    ),
)
