"""A support desk: fifteen tools, four phases, tenants with their own rules, thirty-one kinds of request.

Compile it with `engrain compile examples/support_desk -o agents/support_desk`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from engrain.task import Task
from engrain.tool import from_function
from engrain.trajectory import Message
from engrain.workflow import Phase, Workflow, read_tenants

from . import rules as tenant_rules
from . import tasks as generator
from .goal import check
from .store import READS, WRITES, Desk

PROCEDURE = """\
Work through the customer's items in their order, one call at a time.
First write a plan, a line an item: its mark, as (c), the customer's words for it, "=", its group (question, refund, \
change or matter), its mark and ":", its kind and its order, SKU or ticket. Then call get_customer to learn the \
customer's tier, and verify_identity where the tenant's rules ask for it; if the PIN is wrong, answer "Identity not \
verified." and do nothing else.
Begin each note with the item at hand: its mark, ":", its kind and its order, SKU or ticket. When it is done, note \
its result and name the next one. Whenever a rule decides, first note the rule, the tenant's name, what the rule says \
and the value that you hold against it; before a limit, the customer's tier. Compare numbers in writing: which has \
more digits, or digit by digit until two differ.
Quote the words that matter as the record or the call writes them, name and value: in notes a word of a record that \
decides, and a role, team, version or ticket status that the next call takes; in results what was asked for.
Questions are answered by one read: get_order, get_shipment, get_payment or check_stock. Of the order's three status \
fields only the one named in the rules counts.
Refunds and returns: get_order; deny items of the category that is never taken back. get_shipment; compare the days \
since delivery with the damage window for damaged or defective items, with the return window otherwise; deny when \
over. get_payment; compare the amount with the limit of the customer's tier. Above it, request_approval from the role \
named in the rules, and deny if it is not approved. Orders paid by the method named in the rules get issue_credit, all \
others issue_refund, with the tenant's api_version.
Replacements: as refunds up to the window, then check_stock; send_replacement, or refund when there is no stock.
Double charges: refund the order's amount if there are two charges. Overcharges: refund the excess if there is any. \
Lost parcels: if the parcel is lost, give the remedy named in the rules.
Cancel an order or change its address only while the field that counts says open.
A late parcel gets the goodwill credit if its days in transit are over the late mark.
Sensitive matters (fraud, safety, legal, press, privacy): escalate to the team named in the rules; if none is named, \
open_ticket with that topic. Invoices, callbacks and billing questions: open_ticket.
Answer with one line for each item: its mark, a full stop and its result. A single item is (a)."""

PLAN = "mark and name the items, then find the customer."
EXECUTE = "take the next step of the current item, or answer when all items are done."
VALIDATE = "after a refund or credit read the payment, after a replacement or cancellation read the order, to confirm."
RECOVER = """\
a call failed. Repeat it up to two times after a timeout, 429 or 500, counting the retries. If it still fails: ignore \
it when you were only confirming, otherwise open_ticket with topic handover and go on with the next item. A missing \
record ends the item as not found. A renamed field has the same meaning; if a field is missing from a result, read \
again."""

TOOLS = tuple(from_function(function, state=Desk) for function in (*READS, *WRITES))
ALL = tuple(tool.name for tool in TOOLS)
READ_NAMES = tuple(function.__name__ for function in READS)
CONFIRMED = ("issue_refund", "issue_credit", "send_replacement", "cancel_order")

HERE = Path(__file__).parent
TENANTS = read_tenants(HERE / "tenants")
SEEN = tuple(name for name, tenant in TENANTS.items() if tenant.settings.get("split") != "held_out")
generator.TOOLS.update({tool.name: tool for tool in TOOLS})


def phase_of(messages: Sequence[Message]) -> str:
    last = messages[-1]
    if last.role != "tool":
        return "plan"
    if last.error:
        return "recover"
    return "validate" if last.name in CONFIRMED else "execute"


def tasks(split: str, seed: int) -> Iterator[Task]:
    """Tasks of the seen tenants, and of the held-out ones in split `unseen`."""
    names = [name for name in TENANTS if (name in SEEN) != (split == "unseen")]
    return generator.tasks(split, seed, {name: tenant_rules.parse(TENANTS[name].rules) for name in names})


def open_desk(task: Task) -> Desk:
    """The task's store. A free request, which brings no rows, gets a desk with one customer and three orders."""
    if task.start:
        return Desk(task.start)
    rules = tenant_rules.parse(TENANTS[task.tenant or SEEN[0]].rules)
    return Desk(generator.sample_start(random.Random(0), rules))


workflow = Workflow(
    name="support_desk",
    description="You work at a support desk.",
    procedure=PROCEDURE,
    phases=(
        Phase("plan", PLAN, READ_NAMES),
        Phase("execute", EXECUTE, ALL),
        Phase("validate", VALIDATE, READ_NAMES),
        Phase("recover", RECOVER, ALL),
    ),
    tools=TOOLS,
    tenants=TENANTS,
    phase_of=phase_of,
    tasks=tasks,
    splits=generator.SPLITS,
    open=open_desk,
    teacher=generator.next_turn,
    check=check,
)
