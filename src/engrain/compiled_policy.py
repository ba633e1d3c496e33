"""The compiled agent as a `Policy`: episodes to prompts, completions to messages, each stream with its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Protocol, Self, cast

from transformers import PreTrainedTokenizerBase

from engrain.adapter import Adapter
from engrain.errors import EngrainError
from engrain.policy import Episode
from engrain.renderer import Renderer
from engrain.task import Task
from engrain.tool import Tool
from engrain.trajectory import Message
from engrain.turn import LONGEST_TURN, Completion, Request, Sampling


class Decoder(Protocol):
    """An `Engine`, or a place in one that others use too."""

    renderer: Renderer
    tokenizer: PreTrainedTokenizerBase

    def check(self, request: Request) -> None: ...
    def decode(self, requests: Sequence[Request]) -> list[Completion]: ...
    def release(self, owner: object) -> None: ...


class CompiledPolicy:
    """The model as a policy. A turn that does not end in time comes back as text with `error="truncated"`."""

    name = "compiled"

    def __init__(
        self,
        engine: Decoder,
        *,
        constrained: bool = True,
        max_new: int = LONGEST_TURN,
        adapter_of: Callable[[Episode], Adapter | None] = lambda episode: None,
        in_prompt: Callable[[Task], str] = lambda task: "",
    ) -> None:
        self.engine, self.constrained, self.max_new = engine, constrained, max_new
        self._adapter_of, self.in_prompt = adapter_of, in_prompt
        self._sampling: Sampling | None = None
        self._grammars: dict[tuple[Tool, ...], str] = {}

    def __call__(self, episodes: Sequence[Episode], /) -> list[Message | Exception]:
        requests = [self._request(episode) for episode in episodes]
        completions = iter(self.engine.decode([request for request in requests if isinstance(request, Request)]))
        return [
            self._message(episode, request, next(completions)) if isinstance(request, Request) else request
            for episode, request in zip(episodes, requests, strict=True)
        ]

    def finish(self, episode: Episode, /) -> None:
        self.engine.release(id(episode.trajectory))

    def sampled(self, temperature: float, seed: int) -> Self:
        """The same agent on the same engine, its tokens drawn at a temperature; 0 is greedy, whatever the seed."""
        other = copy(self)
        other._sampling = Sampling(temperature, seed=seed)
        return other

    def _request(self, episode: Episode) -> Request | Exception:
        try:
            prompt = self.engine.renderer.prompt(episode.trajectory)
            grammar = self._grammar(episode.tools) if self.constrained else None
            seed = f"{episode.trajectory.id}:{len(episode.trajectory.messages)}"
            adapter = self._adapter_of(episode)
            request = Request(prompt, grammar, self.max_new, id(episode.trajectory), seed, adapter, self._sampling)
            self.engine.check(request)
        except EngrainError as error:
            return error
        return request

    def _grammar(self, tools: tuple[Tool, ...]) -> str:
        if tools not in self._grammars:
            self._grammars[tools] = self.engine.renderer.grammar(tools)
        return self._grammars[tools]

    def _message(self, episode: Episode, request: Request, completion: Completion) -> Message:
        engine = self.engine
        if completion.error:
            text = cast(str, engine.tokenizer.decode(completion.ids))
            message = Message(role="assistant", content=text, error=completion.error)
        else:
            message = engine.renderer.parse(completion.ids)
        taken = sum(len(turn.tool_calls) for turn in episode.trajectory.messages)
        calls = [call.model_copy(update={"id": f"call_{taken + n}"}) for n, call in enumerate(message.tool_calls)]
        recorded = {
            "tool_calls": calls, "phase": episode.phase.name, "seconds": completion.seconds,
            "prompt_tokens": len(request.prompt), "token_ids": completion.ids, "logprobs": completion.logprobs,
        }  # fmt: skip
        return message.model_copy(update=recorded)
