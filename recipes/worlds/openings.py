"""A family with other checks before the items of a request. A family opens with as many steps as its author gave it; a
base that sees no other number learns the number by heart, and reads on where nothing stands.
"""

from __future__ import annotations

import random
from dataclasses import replace

from worlds.spec import Family, Stop

AS_WRITTEN, NONE = 0.5, 0.25
"""Shares of the worlds to train on that open as written, and that only read the requester's record; the rest drop what
leads round a check."""


def opened(family: Family, rng: random.Random) -> Family:
    """The family with its opening, with its first step alone, or with that and its stops."""
    dice = rng.random()
    if dice < AS_WRITTEN or not family.opening:
        return family
    first, *others = family.opening
    kept = () if dice < AS_WRITTEN + NONE else tuple(step for step in others if isinstance(step, Stop))
    return replace(family, opening=(first, *kept))
