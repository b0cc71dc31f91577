"""The task "text-lm": its tokens, its examples, its model, and that it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from agent.data.settings import DataSettings
from agent.tasks.language import next_token
from agent.tasks.language import tokens as text
from agent.tasks.language.gpt import TextLM
from protocols.errors import DataError, SchemaMismatch, UsageError
from protocols.model import weights
from protocols.model.weights import Weights
from tests.support.callbacks import ignore_step

TINY = {"layers": 1, "heads": 2, "width": 32, "context": 16}
SAYING = "the quick brown fox jumps over the lazy dog; "


torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data" / "more").mkdir(parents=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "data" / "a.txt").write_text(SAYING * 20)
    (tmp_path / "data" / "more" / "b.md").write_text("Grüße! " + SAYING * 20, "utf-8")
    (tmp_path / "data" / "table.csv").write_text("not,read")
    return tmp_path


def data_of(folder: Path, **more: str) -> DataSettings:
    told = {"path": str(folder / "data"), "cache": str(folder / "cache"), "device": "cpu"}
    return DataSettings(**(told | more))  # type: ignore[arg-type]


def loaded(folder: Path, **more: str) -> TextLM:
    task = TextLM()
    task.load(data_of(folder, **more))
    return task


def test_learns_and_gives_the_same_bytes_again(folder: Path) -> None:
    settings = TINY | {"epochs": 4, "lr": 0.01, "batch_size": 8}
    task = loaded(folder)
    base = task.init(1, settings)
    assert base.schema == task.schema(settings)
    trained, again = (loaded(folder).train(base, settings, ignore_step) for _ in range(2))
    assert weights.digest(trained.weights) == weights.digest(again.weights)  # type: ignore[arg-type]
    before, after = (task.evaluate(w, settings, ignore_step) for w in (base, trained.weights))
    assert before.metrics["loss"] == pytest.approx(np.log(257), abs=0.3)
    assert after.metrics["loss"] < 0.6 * before.metrics["loss"]
    assert before.num_examples == after.num_examples


def test_continues_what_it_has_learnt_by_heart(folder: Path, tmp_path: Path) -> None:
    settings = TINY | {"width": 64, "epochs": 12, "lr": 0.01, "batch_size": 8}
    task = loaded(folder)
    made = Weights(task.train(task.init(1, settings), settings, ignore_step).weights)
    (tmp_path / "begun.txt").write_text("the quick brown ")
    for source in ("the quick brown ", str(tmp_path / "begun.txt")):
        (answer,) = TextLM().predict(made, settings, source)
        assert answer["text"] == ["the quick brown "]
        assert answer["continuation"][0].startswith("fox jumps over the lazy dog; the ")


def test_a_token_is_guessed_from_those_before_it_alone() -> None:
    """Changing a token changes no guess before its place, and some after."""
    task = TextLM()
    call = task._ready(task.init(5, TINY), TINY)
    tokens = torch.arange(16)[None]
    changed = tokens.clone()
    changed[0, 9] = 77
    one, other = (call(t) for t in (tokens, changed))
    assert torch.equal(one[:, :9], other[:, :9])
    assert not torch.equal(one[:, 9:], other[:, 9:])


@torch.no_grad()
def test_the_loss_is_that_of_each_next_token_worked_out_one_by_one(folder: Path) -> None:
    task = TextLM()
    call = task._ready(task.init(5, TINY), TINY)
    found = next_token.split_windows(
        text.tokenize(data_of(folder), text.load_tokenizer("bytes", folder)), 16
    )
    starts = found.train[:3]
    ((x, y),) = found.sources(torch.device("cpu"))[0].batches(torch.arange(3), 3)
    assert x.is_contiguous()
    assert y.is_contiguous()
    mean = task.loss(call(x), y)
    sum_of = 0.0
    for start in starts.tolist():
        for place in range(16):
            sofar = torch.from_numpy(np.array(found.tokens[start : start + place + 1]))[None].long()
            guess = call(sofar)[0, -1].log_softmax(0)
            sum_of -= float(guess[int(found.tokens[start + place + 1])])
    assert float(mean) == pytest.approx(sum_of / 48, rel=1e-5)


def test_tokens_are_the_bytes_of_all_files_in_the_order_of_their_paths(folder: Path) -> None:
    made = text.load_tokenizer(text.BYTES, folder)
    found = text.tokenize(data_of(folder), made)
    first, second = ((folder / "data" / p).read_bytes() for p in ("a.txt", "more/b.md"))
    assert found.tolist() == [*first, 256, *second, 256]
    assert (text.tokenize(data_of(folder, cache=""), made) == found).all()
    assert made.decode(found.tolist()) == (first + second).decode()
    one_file = text.tokenize(DataSettings(path=str(folder / "data" / "table.csv")), made)
    assert one_file.tolist() == [*b"not,read", 256]


def test_examples_are_apart_and_cover_the_text() -> None:
    found = next_token.split_windows(np.arange(1001, dtype=np.int32), 10)
    starts = sorted([*found.train.tolist(), *found.held_out.tolist()])
    assert starts == list(range(0, 991, 10))
    assert len(found.held_out) == 10
    assert found.batch(torch.tensor([20])).tolist() == [list(range(20, 31))]
    with pytest.raises(DataError, match="needs 21 tokens"):
        next_token.split_windows(np.arange(20, dtype=np.int32), 10)


def test_text_that_is_not_utf8_is_told_with_its_place(folder: Path) -> None:
    bad = folder / "data" / "latin.txt"
    bad.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError) as caught:
        loaded(folder).traits(TINY)
    assert caught.value.message == "a text is not UTF-8"
    assert f"{bad}, at byte 3" in caught.value.hint
    assert not list((folder / "cache").iterdir())


def test_a_letter_that_lies_across_two_pieces_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_PIECE_BYTES", 3)
    (tmp_path / "a.txt").write_text("aßbΩ漢z", "utf-8")
    assert "".join(text.read_pieces(tmp_path / "a.txt")) == "aßbΩ漢z"
    (tmp_path / "b.txt").write_bytes("漢".encode()[:2])
    with pytest.raises(DataError):
        list(text.read_pieces(tmp_path / "b.txt"))


def test_folders_and_tokenizers_that_cannot_serve(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, said in ((str(empty), "no text"), ("", "no folder"), (str(empty / "x"), "no folder")):
        with pytest.raises(DataError, match=said):
            loaded(folder, path=path).traits(TINY)
    wanted = "ab" * 32
    with pytest.raises(DataError, match="no tokenizer"):
        loaded(folder).traits(TINY | {"tokens": wanted})
    (folder / "data" / "tokenizer.json").write_text("{}")
    with pytest.raises(SchemaMismatch) as caught:
        loaded(folder).traits(TINY | {"tokens": wanted})
    assert caught.value.expected == wanted[:12]
    with pytest.raises(SchemaMismatch, match="vocabulary: expected 300, found 257"):
        loaded(folder).traits(TINY | {"vocabulary": 300})


@pytest.mark.parametrize(
    "settings", [{"heads": 3}, {"layers": 0}, {"dropout": 1.0}, {"context": 1}, {"width": 0}]
)
def test_settings_that_cannot_be(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        TextLM().schema(TINY | settings)


def test_the_gradient_for_scaffold_is_the_way_of_a_step_over_all_examples(folder: Path) -> None:
    settings = TINY | {"optimiser": "sgd", "batch_size": "all", "epochs": 1, "lr": 0.5}
    task = loaded(folder)
    base = task.init(2, settings)
    assert task.lr_times_steps(settings) == 0.5
    made = task.train(base, settings, ignore_step).weights
    for name, gradient in task.gradient(base, settings).items():
        np.testing.assert_allclose((base[name] - made[name]) / 0.5, gradient, atol=1e-5)
