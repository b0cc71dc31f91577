"""The task "lora" on a real model folder: what travels, what it learns, what comes out."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from agent.data.settings import DataSettings
from agent.tasks import Setting, registry
from agent.tasks.language import base_model
from agent.tasks.language import tokens as text
from agent.tasks.language.gpt import TextLM
from agent.tasks.language.lora import Lora
from agent.tasks.training import module_state
from benchmarks.quality.fleet import fleet_of
from coordinator.remote.run_options import build_order
from coordinator.storage.run_events import RunSpec
from coordinator.strategies import averaging
from protocols.errors import DataError, UsageError
from protocols.messages.states import RunState
from protocols.model import weights
from protocols.model.weights import Weights, file_digest
from tests.extras.lora.conftest import write_model
from tests.support.callbacks import ignore_step

FFA: dict[str, Setting] = {"aggregation": "ffa"}
CAUSAL: dict[str, Setting] = {"model": "tiny", "context": 24, "rank": 16, "lr": 0.01}


def data_of(hub: Path, texts: Path, peer: str = "one") -> DataSettings:
    return DataSettings(
        path=str(texts / peer),
        cache=str(texts / f"{peer}-cache"),
        models=str(hub),
        device="cpu",
    )


def loaded(hub: Path, texts: Path) -> Lora:
    task = registry.create("lora")
    assert isinstance(task, Lora)
    task.load(data_of(hub, texts))
    return task


@pytest.mark.parametrize(("aggregation", "below"), [("ffa", 0.8), ("average", 0.7)])
def test_only_adapters_travel_and_the_loss_falls(
    hub: Path, texts: Path, aggregation: str, below: float
) -> None:
    settings = CAUSAL | {"max_steps": 8, "aggregation": aggregation}
    first = loaded(hub, texts).init(0, settings)
    assert any(".lora_A." in name for name in first) == (aggregation == "average")
    adapters = first.nbytes
    # Queries and values of two layers, 256 by 256.
    assert adapters == 2 * 2 * 16 * 256 * 4 * (1 if aggregation == "ffa" else 2)
    whole = (hub / "tiny" / "model.safetensors").stat().st_size
    with fleet_of([data_of(hub, texts, peer) for peer in ("one", "two")]) as fleet:
        run = fleet.run(RunSpec(task="lora", rounds=3, quorum=2, settings=settings))
    assert run.state is RunState.FINISHED
    for closed in run.history:
        assert 2 * adapters <= closed.bytes_up <= 2 * adapters * 1.01
        assert len(closed.contributors) == 2
    assert adapters < whole / 10
    losses = [closed.metrics["loss"] for closed in run.history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < below * np.log(320)


def products(task: Lora, weights: Weights, settings: dict[str, Setting]) -> dict[str, np.ndarray]:
    """What the adapters add to each layer, float64[out, in]."""
    model = task._adapted(task._read(settings))
    module_state.load_tensors(model.tensors(), weights)
    return {
        name: layer.scaling["default"]
        * layer.lora_B["default"].weight.detach().double().numpy()
        @ layer.lora_A["default"].weight.detach().double().numpy()
        for name, layer in model.model.named_modules()
        if hasattr(layer, "lora_A")
    }


def test_the_mean_of_ffa_is_the_mean_of_the_products(hub: Path, texts: Path) -> None:
    """By rounding to float32; the mean of A and B apart is something else."""
    off = {}
    for aggregation in ("ffa", "average"):
        settings = CAUSAL | {"max_steps": 8, "aggregation": aggregation}
        task, updates, trained = loaded(hub, texts), [], []
        base = task.init(1, settings)
        for seed in (1, 2):
            found = task.train(base, settings | {"seed": seed}, ignore_step).weights
            updates.append(Weights(found))
            trained.append(products(task, updates[-1], settings))
        pieces = averaging.average(updates, [0.3, 0.7], [1.0, 1.0], base, lambda mean: mean)
        mean = {part.name: array for piece in pieces for part, array in piece.items()}
        shaped = {name: array.reshape(base[name].shape) for name, array in mean.items()}
        merged = products(task, Weights(shaped), settings)
        off[aggregation] = max(
            np.abs(merged[name] - (0.3 * trained[0][name] + 0.7 * trained[1][name])).max()
            for name in merged
        )
        assert max(np.abs(array).max() for array in merged.values()) > 1e-2
    assert off["ffa"] < 1e-6
    assert off["average"] > 1e-4


def test_the_fixed_factor_is_that_of_every_peer_and_run(hub: Path, texts: Path) -> None:
    """It follows from names alone: a run can go on from the version of another run."""
    models = [
        base_model.load_adapted(hub / "tiny", loaded(hub, texts)._read(CAUSAL | FFA), seed)
        for seed in (1, 2)
    ]
    fixed = [
        {name: p for name, p in model.model.named_parameters() if ".lora_A." in name}
        for model in models
    ]
    assert len(fixed[0]) == 4
    for name, one in fixed[0].items():
        assert torch.equal(one, fixed[1][name])
        assert not one.requires_grad
        assert 0.9 / 16 < one.abs().max() <= 1 / 16  # 1 / sqrt(256), the range of PEFT
    assert not torch.equal(*list(fixed[0].values())[:2])


def test_a_run_without_the_setting_averages_both_factors_as_before(hub: Path, texts: Path) -> None:
    task = loaded(hub, texts)
    assert task.schema(CAUSAL) == task.schema(CAUSAL | {"aggregation": "average"})
    spec = build_order({"task": "lora", "set": ["model=tiny"]}).spec
    assert task.schema(spec.settings) == task.schema(CAUSAL | FFA | {"rank": 8})
    assert len(task.schema(CAUSAL)) == 2 * len(task.schema(spec.settings))


@pytest.mark.parametrize("private", [{}, {"dp-user": 8.0}])
def test_ffa_learns_from_a_masked_sum(hub: Path, texts: Path, private: dict[str, float]) -> None:
    asked = [f"{name}={value}" for name, value in (CAUSAL | {"max_steps": 8}).items()]
    noise = {"weighting": "equal", "outlier-limit": 0.0, "clip-norm": 4.0, **private}
    order = build_order(
        {"task": "lora", "set": asked, "secure": True, "quorum": 3, "rounds": 2, **noise}
    )
    with fleet_of([data_of(hub, texts, p) for p in ("one", "two", "one")], secure=True) as fleet:
        run = fleet.run(order.spec)
        version = weights.load(fleet.lane.version_path(run.head))
    assert run.state is RunState.FINISHED, run.ended_because
    assert not any(".lora_A." in name for name in version)
    if not private:
        assert run.history[-1].metrics["loss"] < 0.9 * np.log(320)


def test_first_weights_follow_from_the_seed_and_change_nothing_yet(hub: Path, texts: Path) -> None:
    task = loaded(hub, texts)
    one, again, other = (task.init(seed, CAUSAL) for seed in (1, 1, 2))
    assert weights.digest(one) == weights.digest(again) != weights.digest(other)
    assert one.schema == task.schema(CAUSAL)
    plain = AutoModelForCausalLM.from_pretrained(hub / "tiny").eval()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(task._ready(one, CAUSAL)(tokens), plain(tokens).logits)


def test_a_merged_export_is_a_model_for_plain_transformers(
    hub: Path, texts: Path, tmp_path: Path
) -> None:
    settings = CAUSAL | FFA | {"max_steps": 6}
    task = loaded(hub, texts)
    trained = task.train(task.init(1, settings), settings, ignore_step).weights
    out = tmp_path / "merged"
    Lora().export(Weights(trained), settings, "merged", data_of(hub, texts), out)
    (answer,) = task.predict(Weights(trained), settings, "a stitch in")
    assert answer["continuation"][0]
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    plain = AutoModelForCausalLM.from_pretrained(hub / "tiny").eval()
    tokens = torch.tensor(AutoTokenizer.from_pretrained(out)("a stitch in time").input_ids)[None]
    with torch.no_grad():
        adapted = task._ready(Weights(trained), settings)(tokens)
        torch.testing.assert_close(merged(tokens).logits, adapted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(merged(tokens).logits, plain(tokens).logits, atol=1e-3)
    assert load_file(out / "model.safetensors").keys() == dict(merged.named_parameters()).keys()


def test_text_lm_on_byte_pairs_of_a_tokenizer_that_the_run_names(hub: Path, texts: Path) -> None:
    shutil.copyfile(hub / "tiny" / "tokenizer.json", texts / "one" / "tokenizer.json")
    digest = file_digest(texts / "one" / "tokenizer.json")
    settings = {"tokens": digest, "vocabulary": 321, "layers": 1, "width": 32, "context": 16}
    task = TextLM()
    task.load(data_of(hub, texts))
    assert task.traits(settings)["tokens"] == (digest,)
    base = task.init(1, settings)
    assert base["tokens.weight"].shape == (321, 32)
    trained = task.train(base, settings | {"epochs": 3, "lr": 0.01}, ignore_step)
    assert trained.metrics["loss"] < 0.8 * np.log(321)
    (answer,) = task.predict(Weights(trained.weights), settings, "many hands make")
    assert answer["continuation"][0].isprintable()
    bytes_of = text.tokenize(data_of(hub, texts), text.load_tokenizer("bytes", texts))
    pairs_of = text.tokenize(data_of(hub, texts), text.load_tokenizer(digest, texts / "one"))
    assert len(pairs_of) < len(bytes_of) / 2
    (texts / "one" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        text.load_tokenizer(file_digest(texts / "one" / "tokenizer.json"), texts / "one")


@pytest.mark.parametrize("aggregation", ["ffa", "average"])
def test_goes_on_where_it_was_cut_off(hub: Path, texts: Path, aggregation: str) -> None:
    settings = CAUSAL | {"max_steps": 6, "aggregation": aggregation}
    task, kept = loaded(hub, texts), []

    def keep(step: int, *_: float) -> None:
        if step == 3:
            found = task.snapshot()
            arrays = {name: array.copy() for name, array in found.arrays.items()}
            kept.append(found._replace(arrays=arrays))

    base = task.init(1, settings)
    whole = task.train(base, settings, keep)
    other = loaded(hub, texts)
    other.restore(kept[0])
    rest = other.train(base, settings, ignore_step)
    assert weights.digest(rest.weights) == weights.digest(whole.weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("saving", [{"micro_batch": 3}, {"checkpointing": True}])
def test_training_that_saves_memory_learns_the_same(
    hub: Path, texts: Path, saving: dict[str, Setting]
) -> None:
    settings = CAUSAL | FFA | {"max_steps": 4, "batch_size": 7, "optimiser": "sgd", "lr": 1.0}
    task = loaded(hub, texts)
    base = task.init(1, settings)
    whole = task.train(base, settings, ignore_step)
    plan = task._read(settings | saving)
    modules = task._adapted(plan).model.modules()
    assert any(getattr(m, "gradient_checkpointing", False) for m in modules) == plan.checkpointing
    saved = task.train(base, settings | saving, ignore_step)
    for name, array in whole.weights.items():
        np.testing.assert_allclose(saved.weights[name], array, atol=1e-6)
    assert max(np.abs(array - base[name]).max() for name, array in whole.weights.items()) > 1e-3
    assert saved.metrics["loss"] == pytest.approx(whole.metrics["loss"], abs=1e-6)


def test_a_classification_learns_with_its_head(hub: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name, words in (("good", "fine warm kind glad"), ("bad", "cold rude sad poor")):
        (tmp_path / name).mkdir()
        for number in range(30):
            chosen = draw.choice(words.split(), 5)
            (tmp_path / name / f"{number}.txt").write_text(" ".join(chosen))
    settings = {"model": "tiny", "kind": "classification", "classes": "good,bad", "context": 32}
    settings |= {"lr": 0.01, "epochs": 2}  # type: ignore[dict-item]
    task = Lora()
    task.load(DataSettings(path=str(tmp_path), models=str(hub), device="cpu"))
    assert task.traits(settings)["classes"] == ("good", "bad")
    base = task.init(1, settings)
    assert any("score" in name for name in base)
    trained = task.train(base, settings, ignore_step)
    assert trained.num_examples == 48
    assert task.evaluate(trained.weights, settings, ignore_step).metrics["accuracy"] > 0.9
    (answer,) = task.predict(Weights(trained.weights), settings, "warm kind glad fine warm")
    assert answer["class"] == ["good"]
    answers = list(task.predict(Weights(trained.weights), settings, str(tmp_path / "bad")))
    assert {a["class"][0] for a in answers} == {"bad"}
    assert len(answers) == 30


def test_another_base_model_is_another_trait(hub: Path, texts: Path, tmp_path: Path) -> None:
    other = tmp_path / "models"
    write_model(other / "tiny", seed=1)
    one, two = (loaded(folder, texts).traits(CAUSAL) for folder in (hub, other))
    assert one["base model"] != two["base model"]
    shutil.rmtree(other)
    shutil.copytree(hub, other)
    assert loaded(other, texts).traits(CAUSAL) == one


def test_model_folders_that_cannot_serve_are_told(hub: Path, texts: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"

    def fault(name: str = "tiny", **words: str) -> DataError:
        task = Lora()
        task.load(DataSettings(path=str(texts / "one"), models=str(models), **words))  # type: ignore[arg-type]
        with pytest.raises(DataError) as caught:
            task.traits(CAUSAL | {"model": name})
        assert str(tmp_path) not in caught.value.message
        return caught.value

    assert "no base model tiny" in fault().message
    assert "one folder's name" in fault("../tiny").message
    shutil.copytree(hub / "tiny", models / "tiny")
    (models / "tiny" / "model.safetensors").unlink()
    assert "has no weights in safetensors" in fault().message
    torch.save({}, models / "tiny" / "pytorch_model.bin")
    assert "pytorch_model.bin" in fault().hint
    (models / "tiny" / "model.safetensors").write_bytes(b"damaged")
    assert "tiny cannot be used" in fault().message
    shutil.copyfile(hub / "tiny" / "model.safetensors", models / "tiny" / "model.safetensors")
    (models / "tiny" / "config.json").write_text('{"model_type": "no such"}')
    assert "tiny cannot be used" in fault().message


def test_code_in_a_model_folder_is_not_run(hub: Path, texts: Path, tmp_path: Path) -> None:
    folder, ran = tmp_path / "models" / "tiny", tmp_path / "ran"
    shutil.copytree(hub / "tiny", folder)
    (folder / "odd.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    config = (folder / "config.json").read_text().replace('"llama"', '"odd"')
    auto = '{"auto_map": {"AutoConfig": "odd.C", "AutoModelForCausalLM": "odd.M"}, '
    (folder / "config.json").write_text(auto + config.lstrip()[1:])
    with pytest.raises(DataError):
        loaded(tmp_path / "models", texts).traits(CAUSAL)
    assert not ran.exists()


def test_the_digest_is_remembered_until_a_file_changes(hub: Path, texts: Path) -> None:
    cache = str(texts / "one-cache")
    first = base_model.digest(hub / "tiny", cache)
    assert base_model.digest(hub / "tiny", "") == first
    assert [p.read_text() for p in Path(cache).glob("base-*")] == [first]


@pytest.mark.parametrize(
    "settings", [{"model": ""}, {"kind": "seq2seq"}, {"rank": 0}, {"kind": "classification"}]
)
def test_settings_that_cannot_be(settings: dict[str, str | int]) -> None:
    with pytest.raises(UsageError):
        Lora().schema(CAUSAL | settings)
