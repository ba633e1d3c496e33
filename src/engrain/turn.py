"""One turn being decoded: its stream is `prompt + ids`, of which a line of the KV cache has encoded a prefix.

Invariant: every token of `ids` either was forced by the grammar or was chosen from a pass's logits, and each gets its
log-probability from the pass that encodes the token before it; between passes, the line ends before the last token that
has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llguidance import LLMatcher

from engrain.adapter import Adapter
from engrain.kv_cache import Line


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedy at temperature 0, else from the nucleus that holds `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()
MATCHED = (4, 2)
"""Lengths of the runs that a draft follows, the longest first."""
LONGEST_TURN = 1536
"""Tokens after which a turn is cut off, unless the caller says otherwise: room for a plan of some forty items."""


@dataclass(frozen=True)
class Request:
    """A turn to decode. Requests with the same `owner` continue one line; `None` keeps nothing afterwards."""

    prompt: Sequence[int]
    grammar: str | None = None
    max_new: int = LONGEST_TURN
    owner: object = None
    seed: str = ""
    adapter: Adapter | None = None
    """What the base is adapted with for this turn. The same object wherever it is the same adapter: a stream goes on
    with, or shares, only what that adapter has encoded."""
    sampling: Sampling | None = None
    """By default the engine's."""


@dataclass(frozen=True)
class Completion:
    ids: list[int]
    """Ends with the stop token, unless there is an error."""
    logprobs: list[float]
    """Under the model's *unmasked* distribution: how likely it found each token before the grammar had its say."""
    seconds: float
    """Wall-clock time from when it began, whatever else was decoded beside it."""
    error: str = ""
    """`truncated` where `max_new` or the context ran out, `grammar` where llguidance gave up."""


class Lookup:
    """Guesses what comes next from what followed the same tokens before (prompt lookup decoding).

    An agent's turn mostly quotes: its request, its rules, its records.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in MATCHED}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        known = len(self._tokens)
        self._tokens += tokens
        for length, after in self._after.items():
            first = max(0, known - length)
            runs = zip(*(self._tokens[first + shift : -length + shift] for shift in range(length)), strict=True)
            after.update(zip(runs, range(first + length, len(self._tokens)), strict=True))

    def draft(self, most: int) -> list[int]:
        """At most so many tokens: those that followed the longest run that the stream ends with, where it was last."""
        for length, after in self._after.items():
            place = after.get(tuple(self._tokens[-length:]))
            if place is not None:
                return self._tokens[place : place + most]
        return []


@dataclass(eq=False)
class Turn:
    """A request under way: its stream is `prompt + ids`, of which the line has encoded a prefix."""

    prompt: list[int]
    line: Line
    matcher: LLMatcher | None
    limit: int
    sampling: Sampling
    seed: str
    kept: bool
    """Whether the line is kept for the owner's next turn."""
    fresh: bool
    """Whether the line is new to this stream."""
    started: float
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    lookup: Lookup | None = None
    stopped: bool = False
    open: bool = True
    """Whether the model is still to choose tokens; a closed turn may still wait for log-probabilities."""
    seconds: float = 0.0

    @property
    def over(self) -> bool:
        """Whether all its tokens are there, and their log-probabilities."""
        return not self.open and len(self.logprobs) == len(self.ids)

    @property
    def completion(self) -> Completion:
        return Completion(self.ids, self.logprobs, self.seconds, self.error)

    @property
    def error(self) -> str:
        if self.matcher is not None and self.matcher.is_error():
            return "grammar"
        return "" if self.stopped else "truncated"

    def append(self, tokens: Sequence[int], stops: frozenset[int]) -> None:
        for token in tokens:
            if self.open:
                self.ids.append(token)
                if self.lookup is not None:
                    self.lookup.extend([token])
                self.stopped = token in stops
                self.open = not self.stopped and len(self.ids) < self.limit

    def draft(self, most: int, stops: frozenset[int]) -> list[int]:
        """A guess at the next tokens, which the grammar allows and which leave room for one more."""
        if self.lookup is None or not self.open:
            return []
        guess = self.lookup.draft(min(most, self.limit - len(self.ids) - 1))
        length = next((place for place, token in enumerate(guess) if token in stops), len(guess))
        if self.matcher is not None:
            length = min(length, self.matcher.validate_tokens(guess[:length]))
        return guess[:length]

    def feed(self) -> list[int]:
        """Tokens to encode now: all that the line lacks, but not the last one of a closed turn: it predicts nothing."""
        stream = self.ids if self.open else self.ids[:-1]
        known = len(self.line.ids) - len(self.prompt)
        return self.prompt[known:] + stream if known < 0 else stream[known:]
