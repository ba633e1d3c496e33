"""A tenant's rules: the values that differ between tenants, written as one bullet each and read back from it.

The Markdown profile is the source; `parse` reads it, so an edited line changes what the teacher does and what the
goal check expects. Each rule may be worded in several ways; `write` picks among them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engrain.errors import WorkflowError

TIERS = ("basic", "silver", "gold")
FIELDS = ("status", "state", "fulfilment")
VERSIONS = ("v1", "v2", "v3", "v4")
ROLES = ("supervisor", "manager", "finance", "director")
SCOPES = ("every request", "changes", "refunds")
SENSITIVE = ("fraud", "safety", "legal", "press", "privacy")
TEAMS = ("risk", "trust", "legal", "care")
METHODS = ("giftcard", "voucher", "crypto")
CATEGORIES = ("hygiene", "food", "software", "jewelry")

WORDINGS: dict[str, tuple[str, ...]] = {
    "limit": (
        "Refunds to {tier} customers need approval above {amount}.",
        "The refund limit for {tier} customers is {amount}.",
        "A {tier} customer may get up to {amount} back without approval.",
    ),
    "field": (
        "The order field that counts is {field}.",
        "Trust {field} to tell where an order stands, not the other two fields.",
        "An order is where its {field} says it is.",
    ),
    "version": (
        "Call refunds and replacements with api_version {version}.",
        "The payment and warehouse systems speak api_version {version}.",
        "Use api_version {version} in every refund and replacement.",
    ),
    "role": (
        "Amounts above the limit are approved by {role}.",
        "Ask {role} when a refund is above the limit.",
        "Only {role} may approve more than the limit.",
    ),
    "identity": (
        "Verify the PIN before {scope}.",
        "An identity check is mandatory for {scope}.",
        "{scope}: only with a verified PIN.",
    ),
    "team": (
        "Escalate {category} to the {team} team.",
        "{category} matters go to the {team} team at once.",
        "The {team} team takes every {category} matter.",
    ),
    "return_days": (
        "Returns are accepted within {days} days of delivery.",
        "A customer may send an item back for {days} days after delivery.",
        "The return window is {days} days.",
    ),
    "damage_days": (
        "Damage and defects must be reported within {days} days of delivery.",
        "The damage window is {days} days.",
        "Broken items are settled for {days} days after delivery.",
    ),
    "late_days": (
        "A parcel is late after {days} days in transit.",
        "Call a parcel late once it travels more than {days} days.",
        "The late mark is {days} days in transit.",
    ),
    "goodwill": (
        "Goodwill credit for a late parcel is {amount}.",
        "Give {amount} credit when a parcel is late.",
        "A late parcel is worth {amount} in credit.",
    ),
    "lost": (
        "A lost parcel gets a {remedy}.",
        "Settle lost parcels with a {remedy}.",
        "When a parcel is lost the remedy is a {remedy}.",
    ),
    "method": (
        "Orders paid by {method} are refunded as credit.",
        "Never refund money to {method}; give credit.",
        "For {method} payments give credit in place of a refund.",
    ),
    "category": (
        "{category} items are never taken back.",
        "Do not refund or replace {category} items.",
        "No returns of {category} items.",
    ),
}
WORDS = {
    "tier": "|".join(TIERS),
    "amount": r"\d+",
    "days": r"\d+",
    "field": "|".join(FIELDS),
    "version": "|".join(VERSIONS),
    "role": "|".join(ROLES),
    "scope": "|".join(SCOPES),
    "team": "|".join(TEAMS),
    "remedy": "refund|replacement",
    "method": "|".join(METHODS),
    "category": "|".join(SENSITIVE + CATEGORIES),
}


def _pattern(wording: str) -> re.Pattern[str]:
    text = re.escape(wording).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(re.sub(r"{(\w+)}", lambda match: f"(?P<{match[1]}>{WORDS[match[1]]})", text))


PATTERNS = [(rule, _pattern(wording)) for rule, wordings in WORDINGS.items() for wording in wordings]


@dataclass(frozen=True)
class Rules:
    """What a profile says."""

    limits: Mapping[str, int]
    field: str
    version: str
    role: str
    identity: str
    return_days: int
    damage_days: int
    late_days: int
    goodwill: int
    lost: str
    method: str
    category: str
    teams: Mapping[str, str]


def draw(rng: random.Random) -> Rules:
    """A random tenant."""
    basic, silver, gold = sorted(rng.sample(range(40, 420, 20), 3))
    return Rules(
        limits={"basic": basic, "silver": silver, "gold": gold},
        field=rng.choice(FIELDS),
        version=rng.choice(VERSIONS),
        role=rng.choice(ROLES),
        identity=rng.choice(SCOPES),
        return_days=rng.choice((14, 21, 30, 45, 60)),
        damage_days=rng.choice((5, 7, 10, 15)),
        late_days=rng.choice((4, 6, 8, 9)),
        goodwill=rng.choice((5, 10, 15, 20, 25)),
        lost=rng.choice(("refund", "replacement")),
        method=rng.choice(METHODS),
        category=rng.choice(CATEGORIES),
        teams={name: rng.choice(TEAMS) for name in sorted(rng.sample(SENSITIVE, 3))},
    )


def write(rules: Rules, rng: random.Random) -> list[str]:
    """The bullets of a profile, in random order and wording."""
    values: list[tuple[str, dict[str, object]]] = [
        *(("limit", {"tier": tier, "amount": amount}) for tier, amount in rules.limits.items()),
        ("field", {"field": rules.field}),
        ("version", {"version": rules.version}),
        ("role", {"role": rules.role}),
        ("identity", {"scope": rules.identity}),
        *(("team", {"category": category, "team": team}) for category, team in rules.teams.items()),
        ("return_days", {"days": rules.return_days}),
        ("damage_days", {"days": rules.damage_days}),
        ("late_days", {"days": rules.late_days}),
        ("goodwill", {"amount": rules.goodwill}),
        ("lost", {"remedy": rules.lost}),
        ("method", {"method": rules.method}),
        ("category", {"category": rules.category}),
    ]
    rng.shuffle(values)
    return [rng.choice(WORDINGS[rule]).format(**words) for rule, words in values]


def said(rules: Rules) -> dict[str, str]:
    """Each rule by the name under which the teacher recalls it, with what it says; a word that will be an argument is
    quoted as the argument."""
    return {
        **{f"{tier} limit": str(amount) for tier, amount in rules.limits.items()},
        "field": rules.field,
        "version": quoted("api_version", rules.version),
        "approver": quoted("role", rules.role),
        "identity": rules.identity,
        "return window": str(rules.return_days),
        "damage window": str(rules.damage_days),
        "late mark": str(rules.late_days),
        "goodwill": str(rules.goodwill),
        "lost parcel": rules.lost,
        "credit method": rules.method,
        "no returns": rules.category,
        **{f"{kind} team": quoted("team", rules.teams[kind]) if kind in rules.teams else "none" for kind in SENSITIVE},
    }


def quoted(name: str, value: object) -> str:
    """A field as JSON writes it: quoting is copying what follows the same words, and is easily checked."""
    return f"{json.dumps(name)}: {json.dumps(value)}"


def judged(limit: int, value: int) -> str:
    """A value held against its limit, digit by digit from the left: `360, 352: 33= 65>, within`."""
    ours, theirs = str(limit), str(value)
    if len(ours) != len(theirs):
        seen = "longer" if len(ours) > len(theirs) else "shorter"
    else:
        first = next((place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours) - 1)
        pairs = zip(ours[: first + 1], theirs[: first + 1], strict=True)
        seen = " ".join(f"{a}{b}{'=' if a == b else '>' if a > b else '<'}" for a, b in pairs)
    return f"{limit}, {value}: {seen}, {'within' if value <= limit else 'over'}"


def parse(bullets: Sequence[str]) -> Rules:
    """Read a profile's bullets. Raises `WorkflowError` for a line that no wording fits or a rule that is missing."""
    limits: dict[str, int] = {}
    teams: dict[str, str] = {}
    single: dict[str, str] = {}
    for bullet in bullets:
        for rule, pattern in PATTERNS:
            if match := pattern.fullmatch(bullet):
                words = match.groupdict()
                if rule == "limit":
                    limits[words["tier"]] = int(words["amount"])
                elif rule == "team":
                    teams[words["category"]] = words["team"]
                else:
                    single[rule] = next(iter(words.values()))
                break
        else:
            raise WorkflowError(f"no rule reads {bullet!r}; see WORDINGS in support_desk/rules.py for how each is said")
    needed = set(WORDINGS) - {"limit", "team"}
    missing = sorted(needed - set(single)) + [f"limit of {tier}" for tier in TIERS if tier not in limits]
    if missing:
        raise WorkflowError(f"the profile says nothing about {', '.join(missing)}; add a bullet for each")
    numbers = {name: int(single.pop(name)) for name in ("return_days", "damage_days", "late_days", "goodwill")}
    return Rules(limits=limits, teams=teams, **numbers, **single)  # type: ignore[arg-type]
