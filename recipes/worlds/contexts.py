"""What a hypernetwork must be able to do with rules that it has never read: the suite of `engrain compare`.

As in `probes.py`, all worlds and tenants are unseen. The tasks are the same whoever meets them, with the rules in the
prompt, in an adapter or nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from engrain.probe import Capability, WholeTask
from engrain.task import Task
from worlds.catalogue import HELD_OUT, TRAINED
from worlds.clerk import expected
from worlds.probes import Place, edited, trials, whole
from worlds.spec import Limit
from worlds.workflow import workflow


def paraphrased(place: Place, task: Task, made: int) -> WholeTask:
    """The task, the tenants' profiles in wordings that nothing was trained on."""
    return WholeTask(workflow(place.world, place.rules, paraphrased=True), task)


def rare(place: Place, task: Task, made: int) -> WholeTask | None:
    """A task that a limit's exception decides: without it something else would be right."""
    right = expected(place.world, task)
    for name, said in task.goal["rules"].items():
        rule = place.world.rules[name]
        if isinstance(rule, Limit) and rule.rare and expected(place.world, _with(task, name, _usual(said))) != right:
            return WholeTask(place.flow, task)
    return None


def _usual(said: Mapping[str, Any]) -> dict[str, Any]:
    """The exception says what is said of all others."""
    return {word: said["else"] for word in said}


def _with(task: Task, name: str, said: Any) -> Task:
    rules = {**task.goal["rules"], name: said}
    return task.model_copy(update={"goal": {**task.goal, "rules": rules}})


suite = (
    Capability("unseen-tenants", "whole tasks of unseen tenants of trained families", partial(trials, TRAINED, whole)),
    Capability("unseen-families", "whole tasks of the families that are held out", partial(trials, HELD_OUT, whole)),
    Capability(
        "edit",
        "whole tasks of `unseen-tenants` after an edit of one line of the profile that changes what is right",
        partial(trials, TRAINED, edited),
        before="unseen-tenants",
    ),
    Capability(
        "edit-families",
        "the same of `unseen-families`",
        partial(trials, HELD_OUT, edited),
        before="unseen-families",
    ),
    Capability(
        "paraphrase",
        "whole tasks of unseen tenants whose rules are worded as no trained rule is",
        partial(trials, TRAINED, paraphrased),
    ),
    Capability("rare-rules", "whole tasks that the exception of a limit decides", partial(trials, TRAINED, rare)),
)
