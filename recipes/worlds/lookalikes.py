"""A family whose arguments are called nearly what a field is called: "wanted_grade", given by a rule, beside a record's
"grade". Its authors wrote few such names, and a base that meets few reads the field in place of the ground.
"""

from __future__ import annotations

import random
from dataclasses import replace

from worlds.language import key, pick
from worlds.spec import Action, Do, Family, Step

ALIKE = 0.3
"""Share of the arguments, in worlds to train on, that are called like a field."""
PREFIXES = ("wanted", "other", "next", "final", "stated", "given", "agreed", "main")


def lookalikes(family: Family, rng: random.Random) -> Family:
    """The family with some arguments named after a field of the record that their action is on."""
    renamed: dict[tuple[str, str], str] = {}
    actions: dict[str, Action] = {}
    for name, action in family.actions.items():
        fields = next(one.fields for record, one in family.records.items() if key(record) == action.on)
        arguments = {}
        for argument, values in action.arguments.items():
            alike = f"{rng.choice(PREFIXES)}_{pick(rng.choice(list(fields)), rng)}"
            if alike not in renamed.values() and rng.random() < ALIKE:
                renamed[key(name), key(argument)] = argument = alike
            arguments[argument] = values
        actions[name] = replace(action, arguments=arguments)

    def step(one: Step) -> Step:
        if not isinstance(one, Do):
            return one
        return replace(one, arguments={renamed.get((one.action, at), at): of for at, of in one.arguments.items()})

    kinds = {name: replace(kind, steps=tuple(map(step, kind.steps))) for name, kind in family.kinds.items()}
    return replace(family, actions=actions, kinds=kinds, opening=tuple(map(step, family.opening)))
