"""The engine decodes what the model says: cached, batched and forced tokens equal those of plain full forwards."""

from __future__ import annotations

import copy
import itertools
import json
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from desk import workflow as desk
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import validate
from templates import FAMILIES, Family, tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engrain import engine as engine_module
from engrain import kv_cache
from engrain.adapter import Adapter, Factors, concat
from engrain.compiled_policy import CompiledPolicy
from engrain.constrain import choose
from engrain.engine import Engine
from engrain.errors import EngrainError, ModelError
from engrain.kv_cache import common_prefix
from engrain.model import sites
from engrain.policy import Episode
from engrain.renderer import Renderer
from engrain.task import Task
from engrain.tool import Tool
from engrain.trajectory import Message, ToolCall, Trajectory
from engrain.turn import Lookup, Request, Sampling
from engrain.workflow import Phase

torch.set_num_threads(1)

TOOLS = (
    Tool("get_order", "Read an order.", json.dumps({
        "type": "object", "required": ["order_id"], "additionalProperties": False,
        "properties": {"order_id": {"type": "string", "maxLength": 8}, "limit": {"type": "integer", "minimum": 0}},
    }), print),
    Tool("refund", "Pay back.", json.dumps({
        "type": "object", "required": ["amount", "reason"], "additionalProperties": False,
        "properties": {"amount": {"type": "number", "maximum": 500}, "reason": {"enum": ["late", "broken", "lost"]}},
    }), print),
)  # fmt: skip
RANDOM = Sampling(temperature=1.2, top_p=0.95)


@cache
def renderer(family: Family = "chatml") -> Renderer:
    return Renderer(tokenizer(family))


@cache
def model(kind: str = "llama", family: Family = "chatml") -> PreTrainedModel:
    """Tiny and random, with weights large enough that its choices depend on the whole context."""
    torch.manual_seed(7)
    shape = {
        "vocab_size": len(tokenizer(family)) + 5, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 2048, "initializer_range": 0.3,
        "bos_token_id": None, "pad_token_id": None, "eos_token_id": list(renderer(family).stop_ids),
    }  # fmt: skip
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(head_dim=16, **shape)).eval()
    if kind == "qwen3 sliding":
        sliding = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
        return Qwen3ForCausalLM(Qwen3Config(head_dim=16, **sliding, **shape)).eval()
    return MistralForCausalLM(MistralConfig(sliding_window=20, **shape)).eval()


KINDS = ("llama", "qwen3", "qwen3 sliding", "mistral")


def make(kind: str = "llama", family: Family = "chatml", together: bool = False, **options: object) -> Engine:
    engine = Engine(model(kind, family), renderer(family), tokenizer(family), **options)  # type: ignore[arg-type]
    engine.cache.together = together  # as on a GPU
    return engine


def prompts(*lengths: int) -> list[list[int]]:
    dice = random.Random(3)
    return [[dice.randrange(400) for _ in range(length)] for length in lengths]


def requests(constrained: bool = True, max_new: int = 60) -> list[Request]:
    """Turns that begin and end at different lengths."""
    grammar = renderer().grammar(TOOLS) if constrained else None
    lengths = enumerate(prompts(3, 300, 40, 1, 90))
    return [Request(prompt, grammar, max_new - 7 * n, seed=str(n)) for n, prompt in lengths]


@torch.inference_mode()
def full_logprobs(network: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


# What is decoded


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_generate(kind: str, together: bool) -> None:
    given_prompts = prompts(3, 50, 17, 300, 33)
    got = make(kind, together=together).generate(given_prompts, max_new=30)
    for prompt, ids in zip(given_prompts, got, strict=True):
        plain = model(kind).generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=30, do_sample=False
        )  # type: ignore[operator]
        assert ids == plain[0, len(prompt) :].tolist()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_batched_equals_single_and_logprobs_are_the_models_own(kind: str, together: bool) -> None:
    batch = make(kind, together=together, sampling=RANDOM).decode(requests())
    assert len({len(completion.ids) for completion in batch}) > 2  # rows end at different times
    for request, batched in zip(requests(), batch, strict=True):
        alone = make(kind, together=together, sampling=RANDOM).decode([request])[0]
        assert batched.ids == alone.ids
        assert batched.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        stream = [*request.prompt, *batched.ids]
        own = full_logprobs(model(kind), stream[:-1])[len(request.prompt) - 1 :]
        expected = own.gather(-1, torch.tensor(batched.ids)[:, None])[:, 0].tolist()
        assert batched.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_forced_runs_equal_choosing_token_by_token_under_the_mask(family: Family) -> None:
    engine = make("llama", family)
    grammar = renderer(family).grammar(TOOLS, answer=False)
    for prompt in prompts(5, 60):
        request = Request(prompt, grammar, 60)
        got = engine.decode([request])[0].ids
        matcher, stream = engine.grammars.matcher(grammar), list(prompt)
        while len(stream) < len(prompt) + 60:
            allowed = engine.grammars.allowed([matcher], torch.device("cpu"))
            assert allowed is not None
            logits = full_logprobs(model("llama", family), stream)[-1]
            stream.append(int(logits.masked_fill(~allowed[0], float("-inf")).argmax()))
            if stream[-1] in renderer(family).stop_ids:
                break
            assert matcher.consume_token(stream[-1])
        assert got == stream[len(prompt) :]


def test_forcing_saves_passes() -> None:
    engine = make(sampling=RANDOM)
    completion = engine.decode([Request([1, 2, 3], renderer().grammar(TOOLS, answer=False), 300)])[0]
    assert completion.error == "" and engine.passes < len(completion.ids)


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_change_no_token(kind: str, constrained: bool) -> None:
    """A random model repeats itself sooner or later, so that drafts are taken and refused."""
    plain, drafting = make(kind, draft=0), make(kind)
    without, with_drafts = (engine.decode(requests(constrained, max_new=120)) for engine in (plain, drafting))
    assert [one.ids for one in with_drafts] == [one.ids for one in without]
    for one, other in zip(with_drafts, without, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4) and one.error == other.error
    if not constrained:
        assert drafting.passes < plain.passes


def test_a_draft_is_what_followed_the_longest_run_last() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 9, 3, 4, 7, 8, 1, 2, 3])
    lookup.extend([4])
    assert lookup.draft(3) == [5, 6, 9]  # four tokens matched, though two of them came again later
    lookup.extend([0])
    assert lookup.draft(3) == []
    lookup.extend([3, 4])
    assert lookup.draft(9) == [0, 3, 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_grammar_reaches_exactly_the_tokens_that_training_sees(family: Family) -> None:
    """Where the mask forces tokens, they must be those of the rendered rows, or the agent leaves its distribution."""
    grammars, grammar = make("llama", family).grammars, renderer(family).grammar(TOOLS)
    for number, reason in itertools.product((0, 3.5, 20), ("late", "lost")):
        arguments = [{"order_id": f"A-{number}"}, {"order_id": "é 1", "limit": 5}, {"amount": number, "reason": reason}]
        for name, one in zip(("get_order", "get_order", "refund"), arguments, strict=True):
            call = ToolCall(id="call_0", name=name, arguments=json.dumps(one, ensure_ascii=False))
            turn = Message(role="assistant", tool_calls=[call])
            trajectory = Trajectory(id="t", messages=[Message(role="user", content="please"), turn])
            row = renderer(family).rows(trajectory)[0]
            trained = [token for token, loss in zip(row.ids, row.mask, strict=True) if loss]
            matcher = grammars.matcher(grammar)
            for token in trained:
                allowed = grammars.allowed([matcher], torch.device("cpu"))
                assert allowed is not None and allowed[0, token], tokenizer(family).decode(trained)
                matcher.consume_token(token)


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_of_a_random_model_fit_the_schema(family: Family) -> None:
    grammar = renderer(family).grammar(TOOLS, answer=False)
    schemas = {tool.name: json.loads(tool.parameters) for tool in TOOLS}
    finished = 0
    for seed in range(4):
        engine = make("llama", family, sampling=Sampling(1.5, 1.0, seed))
        for completion in engine.decode([Request(prompt, grammar, 200, seed=str(n)) for n, prompt in
                                         enumerate(prompts(*range(1, 17)))]):  # fmt: skip
            if completion.error:
                assert completion.error == "truncated" and len(completion.ids) == 200
                continue
            finished += 1
            message = renderer(family).parse(completion.ids)
            (call,) = message.tool_calls
            validate(json.loads(call.arguments), schemas[call.name])
    assert finished > 20


def test_sampling_is_seeded_and_a_small_nucleus_is_greedy() -> None:
    def decode(sampling: Sampling) -> list[list[int]]:
        return [completion.ids for completion in make(sampling=sampling).decode(requests(False, 40))]

    assert decode(Sampling(1.0, 1.0, 1)) == decode(Sampling(1.0, 1.0, 1)) != decode(Sampling(1.0, 1.0, 2))
    assert decode(Sampling(1.0, 1e-9, 1)) == decode(Sampling())


def test_draws_reach_tokens_in_proportion_to_their_nucleus() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    draws = [(n + 0.5) / 1000 for n in range(1000)]
    picked = choose(probabilities.log().expand(1000, -1), None, 1.0, 0.85, draws)
    counts = picked.bincount(minlength=4).tolist()
    assert counts == pytest.approx([0, 444, 222, 333], abs=2)


# What is encoded


def episode(family: Family = "chatml", number: int = 0) -> Episode:
    messages = [Message(role="system", content="You help."), Message(role="user", content=f"Order {number} is late.")]
    trajectory = Trajectory(id=f"t{number}", messages=messages)
    return Episode(Task(id=str(number), request=""), trajectory, Phase("plan", "", ("get_order",)), TOOLS, desk)


def play(engine: Engine, episodes: list[Episode], rounds: int = 4, answer: bool = True) -> CompiledPolicy:
    """Rounds of a turn by the engine and an observation; answers are answered too, so that nobody ends."""
    policy = CompiledPolicy(engine, max_new=40 if answer else 80)
    if not answer:
        policy._grammars[TOOLS] = engine.renderer.grammar(TOOLS, answer=False)
    for turn in range(rounds):
        for one, message in zip(episodes, policy(episodes), strict=True):
            assert isinstance(message, Message)
            one.trajectory.messages.append(message)
            for call in message.tool_calls:
                result = Message(role="tool", content=f'{{"n": {turn}}}', name=call.name, tool_call_id=call.id)
                one.trajectory.messages.append(result)
            if not message.tool_calls:
                one.trajectory.messages.append(Message(role="user", content=f"and then? {turn}"))
    return policy


@pytest.mark.parametrize("family", ["chatml", "llama3"])
def test_every_token_of_a_stable_template_is_encoded_once(family: Family) -> None:
    engine = make("llama", family, sampling=RANDOM)
    ours = episode(family)
    play(engine, [ours], rounds=6)
    assert renderer(family).stable
    last = ours.trajectory.messages[-2] if ours.trajectory.messages[-1].role != "assistant" else None
    assert last is not None and last.prompt_tokens is not None and last.token_ids is not None
    assert engine.encoded_tokens == last.prompt_tokens + len(last.token_ids) - 1  # the last one waits for its successor
    assert engine.cache.lines[0].ids == renderer(family).prompt(ours.trajectory)[: engine.encoded_tokens]


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_turns_equal_turns_encoded_from_scratch(family: Family) -> None:
    """Also where the template rewrites history (qwen3), and for episodes of different lengths. In double precision: a
    draw on the border of two tokens would turn on a float's last bits."""
    double = copy.deepcopy(model("llama", family)).double()

    def make() -> Engine:
        return Engine(double, renderer(family), tokenizer(family), sampling=RANDOM)

    episodes = [episode(family, number) for number in range(3)]
    engine = make()
    play(engine, episodes)
    for one in episodes:
        turns = [n for n, message in enumerate(one.trajectory.messages) if message.role == "assistant"]
        for n in turns:
            past = one.trajectory.model_copy(update={"messages": one.trajectory.messages[:n]})
            fresh = CompiledPolicy(make(), max_new=40)
            (again,) = fresh([Episode(one.task, past, one.phase, one.tools, desk)])
            assert isinstance(again, Message)
            assert again.token_ids == one.trajectory.messages[n].token_ids
            assert again.logprobs == pytest.approx(one.trajectory.messages[n].logprobs, abs=1e-4)


def test_rewritten_history_is_cropped_to_what_is_still_true() -> None:
    engine = make()
    first, second = prompts(60, 50)
    engine.decode([Request(first, max_new=5, owner="a")])
    rewritten = first[:40] + second
    before = engine.encoded_tokens
    got = engine.decode([Request(rewritten, max_new=5, owner="a")])[0]
    assert got.ids == make().generate([rewritten], max_new=5)[0]
    assert engine.encoded_tokens - before == len(rewritten) - 40 + 4


def test_a_common_beginning_is_encoded_once_for_all() -> None:
    (system,) = prompts(200)
    tails = [system + tail for tail in ([1, 2], [3], [4, 5, 6])]
    engine = make()
    assert engine.generate(tails, max_new=1) == [make().generate([tail], max_new=1)[0] for tail in tails]
    assert engine.encoded_tokens == 200 + 2 + 1 + 3
    before = engine.encoded_tokens
    assert engine.generate([[*system, 9, 9]], max_new=1) == make().generate([[*system, 9, 9]], max_new=1)
    assert engine.encoded_tokens - before == 2


def test_the_cache_grows_while_it_is_in_use() -> None:
    engine = make()
    (prompt,) = prompts(250)
    stream = prompt + engine.decode([Request(prompt, max_new=12, owner="a")])[0].ids  # more cells
    more = [Request(stream, max_new=4, owner="a"), *(Request(one, max_new=4) for one in prompts(9, 20, 31))]
    stream += engine.decode(more)[0].ids  # more lines
    assert engine.cache.capacity > 256 and engine.cache.rows == 4
    assert engine.encoded_tokens == 250 + 12 + 3 + (9 + 3) + (20 + 3) + (31 + 3)
    full = full_logprobs(model(), stream[:-1])[249:]
    assert stream[250:] == full.argmax(-1).tolist()


def test_long_prompts_take_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make().generate(prompts(100, 7, 60), max_new=8)
    monkeypatch.setattr(engine_module, "MOST_AT_ONCE", 32)
    engine = make()
    assert engine.generate(prompts(100, 7, 60), max_new=8) == expected
    assert engine.encoded_tokens == 167 + 3 * 7


def test_a_failed_pass_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    (prompt,) = prompts(50)
    engine.decode([Request(prompt, max_new=3, owner="a")])
    with monkeypatch.context() as patch:
        patch.setattr(engine.model.lm_head, "forward", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.decode([Request([*prompt, 5, 6, 7], max_new=3, owner="a")])
    again = engine.decode([Request([*prompt, 5, 6, 7], max_new=3, owner="a")])[0]
    assert again.ids == make().generate([[*prompt, 5, 6, 7]], max_new=3)[0]


@settings(max_examples=15)
@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60), st.integers(1, 40)), min_size=1, max_size=5,
                         unique_by=lambda job: job[0]), min_size=1, max_size=6))  # fmt: skip
def test_any_schedule_of_growing_and_rewritten_streams(rounds: list[list[tuple[int, int, int]]]) -> None:
    """Owners come, go on, rewrite and are evicted (two places for up to six); nothing may leak between lines."""
    engine = make(parallel=2)
    streams: dict[int, list[int]] = {}
    dice = random.Random(0)
    for jobs in rounds:
        for owner, keep, new in jobs:
            streams[owner] = streams.get(owner, [])[:keep] + [dice.randrange(400) for _ in range(new)]
        wanted = [Request(streams[owner], max_new=3, owner=owner) for owner, _, _ in jobs]
        for (owner, _, _), completion in zip(jobs, engine.decode(wanted), strict=True):
            full = full_logprobs(model(), streams[owner] + completion.ids[:-1])[len(streams[owner]) - 1 :]
            assert completion.ids == full.argmax(-1).tolist()
            streams[owner] += completion.ids
        for index, line in enumerate(engine.cache.lines):
            assert line.index == index


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(left: list[int], right: list[int]) -> None:
    length = common_prefix(left, right)
    assert left[:length] == right[:length]
    assert length == min(len(left), len(right)) or left[length] != right[length]


# The policy, adapters, and what is refused


def test_messages_record_how_they_came_about() -> None:
    ours = episode()
    policy = play(make(sampling=RANDOM), [ours], rounds=8, answer=False)
    turns = [message for message in ours.trajectory.messages if message.role == "assistant"]
    for turn in turns:
        assert turn.phase == "plan" and turn.seconds and turn.prompt_tokens and turn.token_ids and turn.logprobs
        assert len(turn.token_ids) == len(turn.logprobs)
        assert (turn.token_ids[-1] in renderer().stop_ids) == (turn.error == "")
    ids = [call.id for turn in turns for call in turn.tool_calls]
    assert len(ids) > 1 and len(set(ids)) == len(ids)
    policy.finish(ours)
    assert isinstance(policy.engine, Engine) and all(line.owner is None for line in policy.engine.cache.lines)


def test_a_turn_that_does_not_end_is_an_invalid_message_and_a_full_context_an_error() -> None:
    small, large = episode(number=1), episode(number=2)
    large.trajectory.messages[1].content = "late " * 200
    got, full = CompiledPolicy(make(max_context=200), max_new=3)([small, large])
    assert isinstance(got, Message) and got.error == "truncated" and got.content and not got.tool_calls
    assert got.token_ids is not None and len(got.token_ids) == 3
    assert isinstance(full, EngrainError) and "context full" in str(full)
    room = make(max_context=60).generate(prompts(50), max_new=512)[0]
    assert len(room) == 10 or room[-1] in renderer().stop_ids


def adapter(seed: int) -> Adapter:
    shapes = sites(model())  # first: making it draws numbers
    torch.manual_seed(seed)
    factors = {site: Factors(torch.randn(2, d_in) * 0.1, torch.randn(d_out, 2)) for site, (d_in, d_out) in
               shapes.items()}  # fmt: skip
    return Adapter(factors, alpha=4.0, rank=2)


def test_merged_equals_hooked_and_the_base_stays_as_it_was() -> None:
    base = make().decode(requests(False, 40))
    seen = []
    for seed in (1, 2):
        merged = make(adapter=adapter(seed)).decode(requests(False, 40))
        hooked_engine = make(adapter=adapter(seed), hooked=True)
        hooked = hooked_engine.decode(requests(False, 40))
        hooked_engine.close()
        for left, right in zip(merged, hooked, strict=True):
            assert left.ids == right.ids and left.logprobs == pytest.approx(right.logprobs, abs=1e-3)
        seen.append([completion.ids for completion in merged])
    assert seen[0] != seen[1] != [completion.ids for completion in base]
    assert make().decode(requests(False, 40))[1].ids == base[1].ids


@pytest.mark.parametrize("together", [False, True])
def test_each_request_of_a_batch_has_its_own_adapter(together: bool) -> None:
    one, two = adapter(1), concat([adapter(2), adapter(3)])
    own = [one, None, two, one, None]
    asked = [replace(request, adapter=mine) for request, mine in zip(requests(), own, strict=True)]
    for request, mixed in zip(asked, make(together=together).decode(asked), strict=True):
        alone = make(adapter=request.adapter, together=together).decode([replace(request, adapter=None)])[0]
        assert mixed.ids == alone.ids and mixed.logprobs == pytest.approx(alone.logprobs, abs=1e-3)


def test_what_one_adapter_encoded_serves_no_other() -> None:
    """Neither a stream that changes its adapter, nor a line that is free, nor a neighbour that begins alike."""
    engine, prompt = make(), prompts(200)[0]
    turns = [
        Request(prompt, None, 20, owner, adapter=mine) for owner in "ab" for mine in (adapter(1), None, adapter(2))
    ]
    expected = [make(adapter=turn.adapter).generate([prompt], max_new=20)[0] for turn in turns]
    assert [engine.decode([turn])[0].ids for turn in turns] == expected
    engine.release("a")
    fresh = [replace(turn, owner=number) for number, turn in enumerate(turns)]
    assert [done.ids for done in engine.decode(fresh)] == expected
    same = engine.encoded_tokens
    engine.decode([replace(fresh[0], owner="again")])
    assert engine.encoded_tokens - same < 30  # and what it did encode, it finds


def test_a_malformed_grammar_is_refused() -> None:
    with pytest.raises(ModelError, match="grammar"):
        make().generate([[1]], grammar="start: unknown_rule")


@pytest.mark.parametrize("change", [{"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
                                    {"layer_types": ["full_attention", "linear_attention"]}])  # fmt: skip
def test_attention_that_the_cache_cannot_reproduce_is_refused(change: dict[str, object]) -> None:
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer("chatml")), hidden_size=16, num_hidden_layers=2,
                                           num_attention_heads=2, intermediate_size=16))  # fmt: skip
    for name, value in change.items():
        setattr(network.config, name, value)
    with pytest.raises(ModelError, match="cannot decode"):
        Engine(network, renderer(), tokenizer("chatml"))


def test_a_model_that_is_not_what_it_says_without_the_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example a base with soft-capped attention, which the cache's attention knows nothing of."""
    apart = kv_cache._apart
    monkeypatch.setattr(kv_cache, "_apart", lambda step, query, *rest: apart(step, query * 2, *rest))
    with pytest.raises(ModelError, match="relative error"):
        make()
