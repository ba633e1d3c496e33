"""`Admission`: who may begin. What is under way, and how many tokens a tenant has left, whatever key it comes with.

Tokens are a bucket that holds a minute's worth and fills evenly. A request is charged for its prompt and for what was
written once it has ended, so the last one of a bucket may overdraw it. Used from the event loop only.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from engrain.keys import Caller
from engrain.serve.refused import Refused


@dataclass
class _Bucket:
    level: float
    seen: float


class Admission:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._under_way = Counter[str]()
        self._buckets: dict[str, _Bucket] = {}

    def enter(self, caller: Caller) -> None:
        """Raises `Refused` for a tenant that has too much under way, or no tokens left."""
        if self._under_way[caller.tenant] >= caller.most_at_once:
            problem = f"{caller.most_at_once} requests of this tenant are under way"
            raise Refused(429, problem, code="rate_limit_exceeded", after=1)
        if caller.tokens_a_minute is not None:
            bucket = self._filled(caller, caller.tokens_a_minute)
            if bucket.level <= 0:
                problem = f"the {caller.tokens_a_minute} tokens a minute of this tenant are used up"
                wait = 60 * (1 - bucket.level) / caller.tokens_a_minute
                raise Refused(429, problem, code="rate_limit_exceeded", after=wait)
        self._under_way[caller.tenant] += 1

    def leave(self, caller: Caller, tokens: int = 0) -> None:
        self._under_way[caller.tenant] -= 1
        if not self._under_way[caller.tenant]:
            del self._under_way[caller.tenant]
        if caller.tokens_a_minute is not None:
            self._filled(caller, caller.tokens_a_minute).level -= tokens

    def _filled(self, caller: Caller, most: int) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.setdefault(caller.tenant, _Bucket(most, now))
        bucket.level = min(most, bucket.level + (now - bucket.seen) * most / 60)
        bucket.seen = now
        return bucket
