"""What customers ask for: thirty-one kinds of request and the English they come in.

Each kind has a canonical title and phrases; `[a|b]` picks one, `[a|]` may leave it out. The phrases of `HELD_OUT` are
never trained on: they say the same things in other constructions.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from string import ascii_lowercase

PHRASES: dict[str, tuple[str, ...]] = {
    "order status": (
        "[what is|tell me|can you tell me] the status of [order|] {o}",
        "how far along is [my|] order {o}",
        "[please|] check where order {o} stands",
    ),
    "parcel status": (
        "where is the parcel [for|of] {o}",
        "[please|] track [the shipment of|the parcel for] {o}",
        "has {o} been [shipped|delivered] [yet|]",
    ),
    "payment status": (
        "[did|has] the payment for {o} [gone|go] through",
        "[what is|tell me] the payment status of {o}",
        "was {o} [paid|charged] [correctly|]",
    ),
    "payment method": (
        "how did I pay for {o}",
        "[which|what] payment method was used for {o}",
        "tell me how {o} was paid",
    ),
    "order amount": (
        "how much [was|did I pay for] [order|] {o}",
        "[what is|tell me] the [total|amount] of {o}",
        "what did {o} cost",
    ),
    "order item": (
        "what [item|product] is in [order|] {o}",
        "what did I [buy|order] in {o}",
        "remind me what {o} [is|was]",
    ),
    "stock": (
        "how many [units|pieces] of {s} [are in stock|do you have]",
        "is {s} [available|in stock]",
        "check the stock of {s}",
    ),
    "tier": (
        "[what|which] tier [am I in|is my account]",
        "tell me my [customer|account] tier",
        "am I a gold customer [or not|]",
    ),
    "transit days": (
        "how [many days|long] has the parcel of {o} been [travelling|in transit]",
        "how long is {o} [on its way|on the way] [already|]",
        "tell me the days in transit of {o}",
    ),
    "refund damaged": (
        "[I want a refund for|refund|give me my money back for] {o}, it [arrived|came] [damaged|broken]",
        "{o} [arrived|was delivered] [damaged|broken], [I want my money back|please refund it]",
        "money back for the damaged [item|order] {o}",
    ),
    "refund defective": (
        "[refund|I want a refund for] {o}, it [does not|never] [works|work]",
        "{o} is [defective|faulty], [please refund it|I want my money back]",
        "money back for the faulty [item|order] {o}",
    ),
    "refund wrong": (
        "[refund|I want a refund for] {o}, you sent the wrong [item|product]",
        "{o} is not what I ordered, [please refund it|I want my money back]",
        "money back for the wrong [item|product] in {o}",
    ),
    "return unwanted": (
        "I [changed my mind about|do not want] {o} [any more|], [take it back|I want to return it]",
        "[I want to|can I] return {o}, [I do not need it|it is unopened]",
        "[please|] take back {o}, it is unopened",
    ),
    "duplicate charge": (
        "I was charged [twice|two times] for {o}",
        "[there is|I see] a [double|duplicate] charge [for|on] {o}",
        "{o} was [billed|charged] twice, [refund one|fix it]",
    ),
    "overcharge": (
        "I [paid|was charged] too much for {o}",
        "{o} cost more than [it should|the price you showed]",
        "[refund|give back] the excess [charge|amount] on {o}",
    ),
    "lost parcel": (
        "{o} never [arrived|came]",
        "[my|the] parcel {o} [is|got] lost",
        "I [did not get|never received] {o}",
    ),
    "replace damaged": (
        "[send a new one|I want a new one|replace] for {o}, it [arrived|came] [damaged|broken]",
        "{o} [arrived|came] broken, [please replace it|send it again]",
        "replace the damaged [item|order] {o}",
    ),
    "replace wrong": (
        "[send the right one|replace] for {o}, you sent the wrong [item|product]",
        "{o} is not what I ordered, [please replace it|send the right one]",
        "replace the wrong [item|product] in {o}",
    ),
    "cancel": (
        "[please|] cancel [order|my order|] {o}",
        "I [want|would like] to cancel {o}",
        "stop order {o}, I cancel it",
    ),
    "change address": (
        "[send|deliver] {o} to {a} [instead|]",
        "[change|update] the address of {o} to {a}",
        "I moved, {o} must go to {a}",
    ),
    "late credit": (
        "{o} is [late|very late|taking too long], [what do I get|I want something for it]",
        "[I want|give me] [credit|something] for the late parcel {o}",
        "the parcel {o} is late again",
    ),
    "fraud": (
        "someone [used|stole] my [card|account]",
        "I [see|found] [a fraud|a fraudulent charge] on my account",
        "there is fraud on my [card|account]",
    ),
    "safety": (
        "[your|the] product [caught fire|hurt my child]",
        "the [item|product] is [dangerous|a safety hazard]",
        "I [want to|must] report a safety problem",
    ),
    "legal": (
        "my lawyer [will contact|writes to] you",
        "I [will|am going to] sue you",
        "this is a legal [notice|matter]",
    ),
    "press": (
        "I am a [journalist|reporter] [with questions|writing a story]",
        "I write for a newspaper [about you|]",
        "this is a press [request|question]",
    ),
    "privacy": (
        "delete [all|] my [personal|] data",
        "[what|which] personal data do you [keep|store]",
        "this is a privacy [request|question]",
    ),
    "invoice": (
        "[send me|I need] an invoice",
        "I need [the invoice|a receipt] for my [taxes|records]",
        "please send [the|my] invoice",
    ),
    "callback": (
        "[please|] call me [back|]",
        "I want to [talk to|speak with] a person",
        "have someone [call|phone] me",
    ),
    "billing": (
        "[explain|I do not understand] my [last|] bill",
        "I have a question [about|on] [my|the] billing",
        "there is something odd [on|in] my bill",
    ),
    "close ticket": (
        "[close|you can close] [ticket|my ticket] {t}",
        "{t} is [solved|done], close it",
        "ticket {t} can be closed",
    ),
    "reopen ticket": (
        "[open ticket|reopen] {t} [again|]",
        "{t} is not [solved|done], open it again",
        "ticket {t} must be reopened",
    ),
}

HELD_OUT: dict[str, tuple[str, ...]] = {
    "order status": ("order {o}, what is its status", "I want to know where {o} stands"),
    "parcel status": ("my parcel of {o}, where is it", "can you track {o}"),
    "payment status": ("the payment of {o}, did it go through",),
    "payment method": ("with what payment method did I pay {o}",),
    "order amount": ("the amount of order {o}, how much is it",),
    "order item": ("order {o}, what product was it",),
    "stock": ("do you have {s} in stock, how many",),
    "tier": ("my account, which tier is it in",),
    "transit days": ("{o}, how many days in transit",),
    "refund damaged": ("the item in {o} is damaged and I want a refund",),
    "refund defective": ("the product {o} never worked, give me my money back",),
    "refund wrong": ("you sent me the wrong product in {o}, I want the money back",),
    "return unwanted": ("{o} is unopened and I do not want it, can I return it",),
    "duplicate charge": ("for {o} I see the charge two times",),
    "overcharge": ("the charge on {o} is too much",),
    "lost parcel": ("the parcel of {o} never came, I think it is lost",),
    "replace damaged": ("the item in {o} is damaged, I want a new one",),
    "replace wrong": ("you sent me the wrong product in {o}, send the right one",),
    "cancel": ("order {o}, please cancel it",),
    "change address": ("the address of {o} must be {a}",),
    "late credit": ("it is too long, {o} is late, give me credit",),
    "fraud": ("a fraudulent person used my card",),
    "safety": ("it is dangerous, a safety matter",),
    "legal": ("you will get a legal notice from my lawyer",),
    "press": ("a journalist from the press has questions",),
    "privacy": ("my personal data, delete it",),
    "invoice": ("an invoice for my records please",),
    "callback": ("a person must phone me back",),
    "billing": ("my bill is odd, explain it",),
    "close ticket": ("please close {t}, it is done",),
    "reopen ticket": ("please open {t}, it is not solved",),
}

OPENINGS = (
    "Hello, I am customer {c}, PIN {p}.",
    "Hi, customer {c} here, my PIN is {p}.",
    "{c} here. PIN {p}.",
    "Good morning. My id is {c} and my PIN {p}.",
    "Dear support, this is {c} ({p}).",
)
OPENINGS_HELD_OUT = ("My PIN is {p}, my customer id {c}.", "This is customer {c} with PIN {p}, good morning.")
LISTS = ("I need a few things:", "Please do the following:", "Several matters:", "Please look at these:")
CLOSINGS = ("", "", " Thank you.", " Thanks.", " Please be quick.")

REFUNDS = (
    "refund damaged",
    "refund defective",
    "refund wrong",
    "return unwanted",
    "duplicate charge",
    "overcharge",
    "lost parcel",
)
CHANGES = (*REFUNDS, "replace damaged", "replace wrong", "cancel", "change address", "late credit")
KINDS = tuple(PHRASES)
QUESTIONS = KINDS[: KINDS.index("transit days") + 1]


@dataclass(frozen=True)
class Item:
    """One thing asked for: its kind, what it is about (an order, SKU or ticket; for a new address, that too), and the
    words in which the customer asks for it."""

    kind: str
    about: str = ""
    address: str = ""
    said: str = ""

    @property
    def title(self) -> str:
        return " ".join(filter(None, (self.kind, self.about)))


def group(kind: str) -> str:
    """What a kind of request is for the rules: a question, a refund, another change, or a matter to pass on."""
    groups = {"question": QUESTIONS, "refund": REFUNDS, "change": CHANGES}
    return next((name for name, kinds in groups.items() if kind in kinds), "matter")


def vary(phrase: str, rng: random.Random) -> str:
    """Pick one of each `[a|b]`."""
    chosen = re.sub(r"\[([^\]]*)\]", lambda match: rng.choice(match[1].split("|")), phrase)
    return re.sub(r" +([,.?]|$)", r"\1", re.sub(r" {2,}", " ", chosen)).strip()


def clause(item: Item, rng: random.Random, held_out: bool) -> str:
    phrases = (HELD_OUT if held_out else PHRASES)[item.kind]
    key = {"stock": "s", "close ticket": "t", "reopen ticket": "t"}.get(item.kind, "o")
    return vary(rng.choice(phrases), rng).format(**{key: item.about, "a": item.address})


def say(items: list[Item], rng: random.Random, held_out: bool) -> list[Item]:
    """The items with the customer's words for each."""
    said = [clause(item, rng, held_out) for item in items]
    if len(said) == 1:
        said[0] = said[0][0].upper() + said[0][1:]
    return [replace(item, said=words) for item, words in zip(items, said, strict=True)]


def mark(place: int) -> str:
    """The mark of an item by its place from 0: (a) to (z), then (aa). No identifier has a letter in parentheses."""
    letters = ascii_lowercase[place % 26]
    return f"({letters * (1 + place // 26)})"


def request(items: list[Item], customer: str, pin: str, rng: random.Random, held_out: bool) -> str:
    """The customer's message: who they are, then what they want, each with its mark when there are several things."""
    opening = rng.choice(OPENINGS_HELD_OUT if held_out else OPENINGS).format(c=customer, p=pin)
    if len(items) == 1:
        body = f"{items[0].said}."
    else:
        body = rng.choice(LISTS) + "".join(f"\n{mark(place)} {item.said}" for place, item in enumerate(items))
    return f"{opening} {body}{rng.choice(CLOSINGS)}"
