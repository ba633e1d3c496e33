"""Drills: short rows that practise one thing many times over.

A trajectory compares two numbers once or twice and recalls a handful of rules, among hundreds of tokens that are easy
by then. A drill is nothing but comparisons, or rules recalled by name (read from the profile, or known), or marked
lines to be found among others that say nearly the same, or a text to repeat, which meets words of the vocabulary that
no support desk uses: an embedding that is never trained is lost to every adapter on top.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from engrain.trajectory import Message, Trajectory

COMPARISONS = 16
WORDS = 60


def drills(
    rng: random.Random,
    count: int,
    tenant: Callable[[], tuple[str, Mapping[str, str]]],
    judged: Callable[[int, int], str],
    lines: Callable[[], Mapping[str, str]],
    english: Sequence[str] = (),
) -> Iterator[Trajectory]:
    """`count` drills. `tenant` gives a system prompt and the rules that hold in it by name; `judged` compares; `lines`
    gives lines by their mark."""
    for number in range(count):
        kind = rng.choice(("recall", "recall", "compare", "find", "repeat"))
        system = "You practise."
        if kind == "recall":
            system, rules = tenant()
            asked, answer = recall(rng, rules)
        elif kind == "compare":
            asked, answer = compare(rng, judged)
        elif kind == "find":
            asked, answer = find(rng, lines())
        else:
            asked, answer = repeat(rng, english)
        messages = [
            Message(role="system", content=system),
            Message(role="user", content=asked),
            Message(role="assistant", content=answer),
        ]
        yield Trajectory(id=f"drill-{number}", messages=messages, kind=kind, teacher="drill")


def recall(rng: random.Random, rules: Mapping[str, str]) -> tuple[str, str]:
    """Rules asked for by name. `rules` maps the whole name, tenant included, to what the rule says."""
    names = rng.sample(list(rules), min(len(rules), 14))
    return "Name: " + "; ".join(names), "; ".join(f"{name}: {rules[name]}" for name in names)


def compare(rng: random.Random, judged: Callable[[int, int], str]) -> tuple[str, str]:
    """Limits and values, as in the teacher's notes; most have as many digits, and often the first ones in common."""
    pairs: list[tuple[int, int]] = []
    while len(pairs) < COMPARISONS:
        limit = rng.randint(3, rng.choice((12, 70, 450)))
        near = max(3, limit // 4) if rng.random() < 0.6 else limit
        pairs.append((limit, max(0, limit + rng.randint(-near, near))))
    asked = "; ".join(f"{limit}, {value}" for limit, value in pairs)
    return f"Compare: {asked}", "; ".join(f"{limit}, {judged(limit, value)}" for limit, value in pairs)


def find(rng: random.Random, lines: Mapping[str, str]) -> tuple[str, str]:
    """Lines asked for by their marks, in another order."""
    marks = rng.sample(list(lines), min(len(lines), 12))
    given = "".join(f"\n{mark} {line}" for mark, line in lines.items())
    return f"Find: {', '.join(marks)}{given}", "\n".join(f"{mark} {lines[mark]}" for mark in marks)


def repeat(rng: random.Random, english: Sequence[str]) -> tuple[str, str]:
    """Sentences, if there are any, and codes to be said again. The codes share digits, so a short match misleads."""
    digits = rng.sample("0123456789", 3)
    words: list[str] = []
    while len(words) < WORDS:
        words += rng.choice(english).split() if english else ()
        words += ["".join((rng.choice("ACST"), *rng.choices(digits, k=4))) for _ in range(rng.randint(1, 4))]
    text = " ".join(words[:WORDS])
    return f"Repeat: {text}", text
