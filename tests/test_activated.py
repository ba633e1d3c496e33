"""An activated adapter acts from the tokens that open a turn on: in training, in the engine and in PEFT alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, tiny, trained_like
from templates import tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from engrain.activated import activated
from engrain.adapter import Adapter, load_peft, merge, save_peft
from engrain.agent import load_agent
from engrain.batch import collate
from engrain.compile import compile_workflow
from engrain.compile_config import CompileConfig
from engrain.engine import Engine, active_from
from engrain.errors import EngrainError, ModelError, RenderError
from engrain.model import PACKED, adapted, attention
from engrain.objective import row_loss
from engrain.renderer import Renderer, Row
from engrain.rollout import rollout
from engrain.service import Asked, Service
from engrain.trajectory import Message, read_trajectories
from engrain.turn import Request
from engrain.workflow import load_workflow

OPENING = (7, 8)
ROW = Row(
    [1, 2, 3, 7, 8, 20, 21, 9, 4, 5, 7, 8, 30, 9, 6], [False] * 5 + [True] * 3 + [False] * 4 + [True] * 2 + [False]
)
"""Two turns, which open at 3 and at 10."""


def own(architecture: str, seed: int = 1) -> tuple[PreTrainedModel, Adapter]:
    model = tiny(architecture)
    adapter = trained_like(model, seed=seed)
    return model, Adapter(adapter.factors, adapter.alpha, adapter.rank, OPENING)


def logits(model: PreTrainedModel, ids: list[int], adapter: Adapter, start: int) -> Tensor:
    """Of a sequence on which the adapter acts from a place on, without any cache."""
    with torch.no_grad(), adapted(model, adapter, acting=torch.arange(len(ids)) >= start):
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def test_turns_are_said_once_more_and_carry_the_loss() -> None:
    row = activated(ROW, OPENING)
    assert row.turns == ((3, 8), (10, 14))
    assert row.ids == [*ROW.ids[:10], *ROW.ids[3:8], *ROW.ids[10:14]]
    assert [token for token, trained in zip(row.ids, row.mask, strict=True) if trained] == [20, 21, 9, 30, 9]
    batch = collate([row, Row([1, 2], [False, True])])
    assert batch.position_ids.tolist() == [*range(10), *range(3, 8), *range(10, 14), 0, 1]
    assert batch.acting is not None and batch.acting.tolist() == [False] * 10 + [True] * 9 + [False] * 2
    with pytest.raises(RenderError, match="open with the tokens"):
        activated(ROW, (7, 7))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_of_a_row_is_that_of_its_turns_one_by_one(architecture: str) -> None:
    model, adapter = own(architecture)
    batch = collate([activated(ROW, OPENING)])
    with torch.no_grad(), attention(model, PACKED), adapted(model, adapter, batch.spans, batch.acting):
        found, count = row_loss(model, adapter, batch)
    expected = 0.0
    for start, end in ((3, 8), (10, 14)):
        said = logits(model, ROW.ids[:end], adapter, start).log_softmax(-1)
        expected -= sum(float(said[place - 1, ROW.ids[place]]) for place in range(start + 2, end))
    assert count == 5 and float(found) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_engine_switches_adapters_and_encodes_only_turns_again(architecture: str) -> None:
    chat = tokenizer("chatml")
    renderer = Renderer(chat)
    model = tiny(architecture, vocab_size=len(chat), max_position_embeddings=512)
    first, second = (
        Adapter(made.factors, made.alpha, made.rank, renderer.invocation())
        for made in (trained_like(model, seed=seed) for seed in (1, 2))
    )
    shared = chat.encode("<|im_start|>system\n" + "be brief and kind " * 12 + "<|im_end|>\n", add_special_tokens=False)
    opening = list(renderer.invocation())
    engine = Engine(model, renderer, chat, parallel=2, max_context=512)

    def decode(prompt: list[int], adapter: Adapter | None, owner: str) -> tuple[list[int], int]:
        before = engine.encoded_tokens
        (made,) = engine.decode([Request(prompt, None, 6, owner=owner, adapter=adapter)])
        return made.ids, engine.encoded_tokens - before

    def exact(prompt: list[int], adapter: Adapter | None) -> list[int]:
        ids = list(prompt)
        for _ in range(6):
            start = active_from(adapter, prompt) if adapter else 0
            ids.append(int(logits(model, ids, adapter or Adapter({}, 1.0, 1), start)[-1].argmax()))
        return ids[len(prompt) :]

    prompt = [*shared, *opening]
    said, _ = decode(prompt, first, "one")
    assert said == exact(prompt, first) != exact(prompt, second)
    longer = [*prompt, *said, *chat.encode("<|im_end|>\nand?", add_special_tokens=False), *opening]
    again, encoded = decode(longer, second, "one")  # the earlier turn is the base's now
    assert again == exact(longer, second) and encoded < len(longer) - len(shared) + 12
    other, encoded = decode(prompt, second, "two")  # what comes before the turn is copied
    assert other == exact(prompt, second) and encoded < len(opening) + 12
    plain, _ = decode(prompt, None, "three")
    assert plain == exact(prompt, None)
    together = engine.decode([Request(one, None, 6, adapter=by) for one, by in ((longer, first), (prompt, second))])
    assert [made.ids for made in together] == [exact(longer, first), exact(prompt, second)]
    with pytest.raises(EngrainError, match="which the prompt does not have"):
        engine.check(Request(shared, adapter=first))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_acts_on_the_same_tokens(tmp_path: Path) -> None:
    from peft import PeftModel

    model, adapter = own("llama")
    prompt = ROW.ids[:12]
    expected = logits(model, prompt, adapter, 10)[-1]
    save_peft(adapter, tmp_path / "adapter")
    assert load_peft(tmp_path / "adapter").invocation == OPENING
    theirs = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter")
    made = theirs.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=1, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    torch.testing.assert_close(made.logits[0][0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="cannot be merged"):
        merge(model, adapter)


@pytest.mark.parametrize("to", ["lora", "hypernetwork"])
def test_a_workflow_compiles_to_activated_adapters(
    to: str, library: Path, runs: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = CompileConfig(tokens=3000, to=to, rank=2, batch_tokens=1024, activated=True)  # type: ignore[arg-type]
    compile_workflow(library, tmp_path / "agent", config, data=runs, base=tiny_base)
    agent, workflow = load_agent(tmp_path / "agent"), load_workflow(library)
    run, *_ = read_trajectories(runs)
    task = next(task for task in workflow.tasks("train", 0) if task.id == run.task)
    policy = agent.policy(workflow, 1)
    asked = []
    decode = policy.engine.decode
    policy.engine.decode = lambda requests: (asked.extend(requests), decode(requests))[1]  # type: ignore[method-assign]
    (made,) = rollout(workflow, [task], policy, parallel=1)
    assert made.steps and all(request.adapter.invocation == agent.renderer.invocation() for request in asked)
    service = Service(agent, workflow, parallel=1)
    served = service.prepare(task.tenant, Asked((Message(role="user", content=task.request),))).request.adapter
    service.close()
    assert served is not None and served.invocation == agent.renderer.invocation()
    with pytest.raises(EngrainError, match=r"cannot be merged|only for a context"):
        agent.load()


def test_all_weights_cannot_be_activated() -> None:
    with pytest.raises(EngrainError, match="act on all tokens"):
        CompileConfig(to="full", activated=True)
