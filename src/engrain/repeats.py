"""Repeats: several trials of the same tasks, which differ in the sampling seed alone.

A trajectory of one of several trials says which (`meta["trial"]`, from 1), and its id ends with it.
"""

from __future__ import annotations

from engrain.errors import InputError
from engrain.policy import Policy
from engrain.trajectory import Trajectory


def sampled(policy: Policy, temperature: float, trial: int, arm: str) -> Policy:
    """The policy as it draws its tokens in this trial; itself at temperature 0.

    Raises `InputError` if it has no `sampled(temperature, seed)`.
    """
    if temperature <= 0:
        return policy
    draws = getattr(policy, "sampled", None)
    if draws is None:
        raise InputError(f"arm {arm!r} cannot be sampled; leave it out of --arms, or --temperature and --trials")
    return draws(temperature, trial)


def numbered(trajectory: Trajectory, trial: int) -> Trajectory:
    """The trajectory as that of one trial."""
    meta = {**trajectory.meta, "trial": str(trial)}
    return trajectory.model_copy(update={"id": f"{trajectory.id}:{trial}", "meta": meta})
