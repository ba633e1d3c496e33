"""What operators see of a server: Prometheus metrics, and OpenTelemetry spans by its conventions for generative AI.

Spans go wherever the process was set up to send them (`opentelemetry-instrument engrain serve ...`); without that they
cost next to nothing. Invariant: neither holds what was said, nor whose it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry import propagate, trace
from opentelemetry.context import Context as Parent
from opentelemetry.trace import Span, SpanKind, StatusCode
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engrain.service import Prepared, Service
from engrain.trajectory import Message as Turn

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Telemetry:
    """Of one server; turns report to it from any thread."""

    def __init__(self, service: Service) -> None:
        self.registry = registry = CollectorRegistry()
        self._model = service.name
        self._tracer = trace.get_tracer("engrain")
        self._http = Counter(
            "engrain_http_requests", "Answers by route and status.", ["route", "status"], registry=registry
        )
        self._turns = Counter("engrain_turns", "Turns by how they ended.", ["ended"], registry=registry)
        self._tokens = Counter("engrain_tokens", "Tokens read and written.", ["direction"], registry=registry)
        self._in_prompt = Counter("engrain_contexts_in_prompt", "Turns whose rules are too strange for an adapter.",
                                  registry=registry)  # fmt: skip
        self._first = Histogram("engrain_first_token_seconds", "From accepting a turn to its first token.",
                                buckets=SECONDS, registry=registry)  # fmt: skip
        self._whole = Histogram("engrain_turn_seconds", "From accepting a turn to its end.", buckets=SECONDS,
                                registry=registry)  # fmt: skip
        gauges = {
            "engrain_turns_decoding": ("Turns that are being decoded.", lambda: service.load()[0]),
            "engrain_turns_waiting": ("Turns that wait for a place.", lambda: service.load()[1]),
            "engrain_adapters_kept": ("Adapters in memory.", lambda: service.adapters_kept()[0]),
            "engrain_adapters_bytes": ("Bytes of the adapters in memory.", lambda: service.adapters_kept()[1]),
        }
        for name, (about, value) in gauges.items():
            Gauge(name, about, registry=registry).set_function(value)

    def metrics(self) -> bytes:
        return generate_latest(self.registry)

    def answered(self, route: str, status: int) -> None:
        self._http.labels(route, str(status)).inc()

    def turn(self, prepared: Prepared, headers: Mapping[str, str]) -> Observed:
        """A turn that has been accepted."""
        sampling = prepared.asked.sampling
        span = self._tracer.start_span(
            f"chat {self._model}", propagate.extract(headers), SpanKind.SERVER,
            {
                "gen_ai.operation.name": "chat", "gen_ai.provider.name": "engrain", "gen_ai.request.model": self._model,
                "gen_ai.request.max_tokens": prepared.asked.most_tokens,
                "gen_ai.request.temperature": sampling.temperature, "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.seed": sampling.seed,
            },
        )  # fmt: skip
        if prepared.in_prompt:
            self._in_prompt.inc()
        return Observed(self, span)

    def run(self, headers: Mapping[str, str]) -> Span:
        about = {"gen_ai.operation.name": "invoke_agent", "gen_ai.provider.name": "engrain",
                 "gen_ai.agent.name": self._model}  # fmt: skip
        return self._tracer.start_span(
            f"invoke_agent {self._model}", propagate.extract(headers), SpanKind.SERVER, about
        )

    def step(self, run: Span, message: Turn) -> None:
        """A turn or a tool's answer, which has just ended, within a run."""
        if message.role not in ("assistant", "tool"):
            return
        if message.role == "tool":
            name, about = f"execute_tool {message.name}", {"gen_ai.operation.name": "execute_tool",
                                                            "gen_ai.tool.name": message.name}  # fmt: skip
        else:
            name, about = f"chat {self._model}", {
                "gen_ai.operation.name": "chat", "gen_ai.provider.name": "engrain", "gen_ai.request.model": self._model,
                "gen_ai.usage.input_tokens": message.prompt_tokens or 0,
                "gen_ai.usage.output_tokens": len(message.token_ids or ()),
            }  # fmt: skip
            self._tokens.labels("in").inc(message.prompt_tokens or 0)
            self._tokens.labels("out").inc(len(message.token_ids or ()))
        began = time.time_ns() - round(1e9 * (message.seconds or 0.0))
        parent: Parent = trace.set_span_in_context(run)
        span = self._tracer.start_span(name, parent, SpanKind.INTERNAL, about, start_time=began)
        if message.error:
            span.set_status(StatusCode.ERROR, message.error)
            span.set_attribute("error.type", message.error)
        span.end()


class Observed:
    """One turn under way."""

    def __init__(self, telemetry: Telemetry, span: Span) -> None:
        self._telemetry, self._span = telemetry, span
        self._began, self._started = time.perf_counter(), False

    def first(self) -> None:
        """Something has been written; only the first time counts."""
        if not self._started:
            self._started = True
            self._telemetry._first.observe(time.perf_counter() - self._began)

    def ended(self, how: str, read: int, written: int) -> None:
        self._telemetry._turns.labels(how).inc()
        self._telemetry._tokens.labels("in").inc(read)
        self._telemetry._tokens.labels("out").inc(written)
        self._telemetry._whole.observe(time.perf_counter() - self._began)
        self._span.set_attributes({"gen_ai.usage.input_tokens": read, "gen_ai.usage.output_tokens": written,
                                   "gen_ai.response.finish_reasons": (how,)})  # fmt: skip
        if how in ("failed", "cancelled", "refused"):
            self._span.set_status(StatusCode.ERROR, how)
        self._span.end()


class Counted:
    """Middleware that counts answers by route, so that nobody can make labels without end."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app, self._telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self._telemetry.answered(route, message["status"])
            await send(message)

        await self._app(scope, receive, watched)
