"""Conversations: which tokens count, how rows are filled, what is learnt and evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from agent.data import conversations
from agent.data.conversations import Conversation, Message
from agent.data.settings import DataSettings
from agent.tasks import Setting
from agent.tasks.language import base_model
from agent.tasks.language.chat import IGNORED, ChatFormat, fill_rows
from agent.tasks.language.lora import Lora
from benchmarks.quality.fleet import fleet_of
from coordinator.storage.run_events import RunSpec
from protocols.errors import DataError, SchemaMismatch
from protocols.messages.states import RunState
from protocols.model.weights import Weights
from tests.support.callbacks import ignore_step

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
#: Leaves out all answers but the last, as templates that drop thoughts do.
FORGETFUL = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}"
    "<|{{ m.role }}|>{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK: Conversation = (
    Message("user", "the quick fox"),
    Message("assistant", "jumps"),
    Message("user", "and then"),
    Message("assistant", "gold"),
)
COLORS = {"gold": "not", "dog": "lazy", "fox": "quick", "work": "light", "time": "nine"}
SETTINGS: dict[str, Setting] = {
    "model": "tiny",
    "kind": "chat",
    "aggregation": "ffa",
    "context": 48,
    "rank": 16,
    "lr": 0.02,
}


@pytest.fixture
def said(tmp_path: Path) -> Path:
    """Questions with one of five answers, 300 of them."""
    path = tmp_path / "said.jsonl"
    rows = [
        {"prompt": f"{number}: {word}?", "completion": COLORS[word]}
        for number in range(60)
        for word in COLORS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def format_of(hub: Path, template: str | None) -> ChatFormat:
    tokens = AutoTokenizer.from_pretrained(hub / "tiny")
    tokens.chat_template = template
    return ChatFormat(tokens, tokens.eos_token_id)


def loaded(hub: Path, said: Path) -> Lora:
    task = Lora()
    task.load(DataSettings(path=str(said), models=str(hub), device="cpu"))
    return task


@pytest.mark.parametrize(
    ("template", "answers", "whole"),
    [
        (
            CHATML,
            ["jumps<end>", "gold<end>"],
            "<|user|>the quick fox<end><|assistant|>jumps<end>"
            "<|user|>and then<end><|assistant|>gold<end>",
        ),
        (
            None,
            ["jumps<end>", "gold<end>"],
            "user:\nthe quick fox\n\nassistant:\njumps<end>"
            "\n\nuser:\nand then\n\nassistant:\ngold<end>",
        ),
        (
            FORGETFUL,
            ["gold<end>"],
            "<|user|>the quick fox<end><|user|>and then<end><|assistant|>gold<end>",
        ),
    ],
)
def test_answers_count_and_nothing_else(
    hub: Path, template: str | None, answers: list[str], whole: str
) -> None:
    made = format_of(hub, template)
    tokens, found = AutoTokenizer.from_pretrained(hub / "tiny"), made.segments(TALK)
    assert [tokens.decode(one.tokens) for one in found if one.is_answer] == answers
    assert tokens.decode([t for one in found for t in one.tokens]) == whole
    question = made.question(TALK)
    assert whole.startswith(tokens.decode(question.prompt).replace("jumps\n", "jumps<end>\n"))
    assert question.answer == "gold"


def test_a_template_that_refuses_a_role_is_told(hub: Path) -> None:
    made = format_of(hub, "{{ raise_exception('no such role') }}")
    with pytest.raises(DataError, match="template of the base model") as caught:
        made.segments(TALK)
    assert "no such role" in caught.value.hint


def test_rows_hold_whole_conversations_and_count_their_answers(hub: Path) -> None:
    made = format_of(hub, CHATML)
    one = made.segments(TALK)
    length = sum(len(part.tokens) for part in one)
    answers = sum(len(part.tokens) for part in one if part.is_answer)
    rows = fill_rows([one] * 5, 2 * length + 3, 0, packing=True)
    assert rows.tokens.shape == (3, 2 * length + 4)
    assert rows.counted.sum(1).tolist() == [2 * answers, 2 * answers, answers]
    assert rows.positions[0, : 2 * length].tolist() == [*range(length)] * 2
    assert fill_rows([one] * 5, 2 * length, 0, packing=False).tokens.shape[0] == 5
    short = fill_rows([one, made.segments(TALK[:2])], length - 2, 0, packing=True)
    assert (short.cut, short.left_out, len(short.tokens)) == (1, 0, 2)
    none = fill_rows([one], 3, 0, packing=True)
    assert (none.cut, none.left_out, len(none.tokens)) == (1, 1, 0)
    ((x, y),) = rows.examples(torch.device("cpu")).batches(torch.arange(3), 3)
    flat = y[y != IGNORED]
    assert len(flat) == 5 * answers
    assert torch.equal(flat, torch.from_numpy(rows.tokens[rows.counted]))
    assert x["tokens"].shape == x["positions"].shape == y.shape


def test_attention_stays_within_a_conversation(hub: Path, said: Path) -> None:
    """The loss of packed rows is that of one conversation a row."""
    task = loaded(hub, said)
    model = task._adapted(task._read(SETTINGS)).eval()
    made = format_of(hub, CHATML)
    talks = [made.segments(TALK), made.segments(TALK[2:]), made.segments(TALK[:2])]
    packed, alone = (fill_rows(talks, 160, 0, packing=packing) for packing in (True, False))
    assert (len(packed.tokens), len(alone.tokens)) == (1, 3)
    answers, across = [], torch.empty(0)
    for rows in (packed, alone):
        ((x, y),) = rows.examples(torch.device("cpu")).batches(torch.arange(len(rows.tokens)), 9)
        with torch.no_grad():
            answers.append(model(**x)[y != IGNORED])
            across = model(x["tokens"])[y != IGNORED] if rows is packed else across
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(across, answers[0], atol=1e-2)


@pytest.mark.parametrize("packing", [True, False])
def test_it_learns_the_answers_and_an_evaluation_generates_them(
    hub: Path, said: Path, packing: bool
) -> None:
    settings = SETTINGS | {"packing": packing, "exact_match": 10}
    task = loaded(hub, said)
    base = task.init(1, settings)
    before = task.evaluate(base, settings, ignore_step)
    assert before.metrics["exact_match"] == 0.0
    trained = Weights(task.train(base, settings | {"epochs": 12}, ignore_step).weights)
    after = task.evaluate(trained, settings, ignore_step)
    assert after.metrics["loss"] < 0.3 * before.metrics["loss"]
    assert after.metrics["exact_match"] >= 0.8
    held = [one for one in conversations.read(str(said)) if conversations.is_held_out(one)]
    (answer,) = task.predict(trained, settings, held[0][0].content)
    assert answer["continuation"][0].strip() in COLORS.values()


def test_a_fleet_learns_from_conversations(hub: Path, said: Path) -> None:
    data = DataSettings(path=str(said), models=str(hub), device="cpu")
    settings = SETTINGS | {"max_steps": 12, "exact_match": 4}
    with fleet_of([data, data]) as fleet:
        run = fleet.run(RunSpec(task="lora", rounds=2, quorum=2, settings=settings))
    assert run.state is RunState.FINISHED, run.ended_because
    losses = [closed.metrics["loss"] for closed in run.history]
    assert losses[1] < losses[0]
    assert 0.0 <= run.history[-1].metrics["exact_match"] <= 1.0


def test_peers_with_another_template_or_base_are_told(hub: Path, said: Path) -> None:
    told = loaded(hub, said).traits(SETTINGS)
    assert len(told["chat template"][0]) == 16
    digest = told["base model"][0]
    assert digest == base_model.digest(hub / "tiny", "")
    assert loaded(hub, said).traits(SETTINGS | {"digest": digest}) == told
    with pytest.raises(SchemaMismatch):
        loaded(hub, said).traits(SETTINGS | {"digest": "0" * 64})


def test_too_few_conversations_are_told(hub: Path, tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="too few conversations"):
        loaded(hub, path).traits(SETTINGS)


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_few_bits_are_refused_where_they_do_not_work(hub: Path, said: Path, how: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a graphics card")
    with pytest.raises(DataError, match="lacks an NVIDIA graphics card") as caught:
        loaded(hub, said).init(1, SETTINGS | {"quantized": how})
    assert "quantized=no" in caught.value.hint


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_adapters_of_a_base_of_few_bits_learn(hub: Path, said: Path, how: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no graphics card")
    pytest.importorskip("bitsandbytes")
    task = Lora()
    task.load(DataSettings(path=str(said), models=str(hub), device="cuda"))
    settings = SETTINGS | {"quantized": how, "max_steps": 8}
    base = task.init(1, settings)
    before = task.evaluate(base, settings, ignore_step).metrics["loss"]
    trained = Weights(task.train(base, settings, ignore_step).weights)
    assert task.evaluate(trained, settings, ignore_step).metrics["loss"] < before
    assert not np.array_equal(next(iter(trained.values())), next(iter(base.values())))
