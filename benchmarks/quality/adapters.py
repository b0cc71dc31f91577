"""Four ways to make one adapter of many: exactness, bytes, and loss after the same rounds.

`python -m benchmarks.quality.adapters [--way ffa stack svd average] [--seed N…] [--lr X]`

A small Llama is made on the spot: it learns from the topics of Python's manual (`pydoc_data`) for
some steps, and then four peers adapt it to the docstrings of Python's library, each to its own
modules. Of each peer's windows every tenth is held out. It needs the extra `lora`. What was
measured is in `docs/quality/adapters.json`, and is not measured again.
"""

from __future__ import annotations

import argparse
import functools
import json
import pydoc_data.topics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agent.data.settings import DataSettings
from agent.tasks import Setting
from agent.tasks.language.lora import Lora
from benchmarks.quality import language
from benchmarks.quality.fleet import fleet_of
from coordinator.remote.run_options import build_order
from coordinator.strategies import averaging, svd
from protocols.codecs import factors, registry
from protocols.codecs.factors import DELTA, A, B
from protocols.codecs.registry import FactoredUpdate
from protocols.model import weights
from protocols.model.weights import Weights

WAYS = ("ffa", "stack", "svd", "average")
LR = 1e-2
PEERS, ROUNDS, STEPS, BATCH, RANK, CONTEXT = 4, 6, 10, 8, 4, 64
WIDTH, LAYERS, VOCABULARY = 64, 2, 512
#: Text of a peer. More only takes more time to evaluate.
MAX_CHARS = 40_000
FIRST_STEPS = 150
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "quality" / "adapters.json"

Products = dict[str, npt.NDArray[np.float64]]


def make_model(folder: Path, seed: int) -> None:
    """A Llama and its byte-pair tokens, trained for a while on the topics of the manual."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet
    )
    made.train_from_iterator(topics, trainer)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    tokens = torch.tensor(made.encode("\n\n".join(topics)).ids)
    starts = torch.arange(0, len(tokens) - CONTEXT, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(FIRST_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20)
        chosen = starts[torch.randint(len(starts), (BATCH,))]
        x = tokens[chosen[:, None] + torch.arange(CONTEXT)]
        optimizer.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(folder)


_docstrings = functools.cache(lambda: language.texts()[len(pydoc_data.topics.topics) :])


def parts(folder: Path, hub: Path) -> list[DataSettings]:
    """The texts of each peer: the docstrings of every fourth module."""
    dealt, found = _docstrings(), []
    for peer in range(PEERS):
        mine, text = folder / str(peer), "\n\n".join(dealt[peer::PEERS])[:MAX_CHARS]
        cache = folder / f"{peer}-cache"
        mine.mkdir()
        cache.mkdir()
        (mine / "text.txt").write_text(text)
        found.append(
            DataSettings(
                index=peer,
                parts=PEERS,
                path=str(mine),
                cache=str(cache),
                models=str(hub),
                device="cpu",
            )
        )
    return found


def measured(hub: Path, way: str, seed: int, lr: float, rounds: int) -> dict[str, Any]:
    """A row of the results."""
    began = time.monotonic()
    torch.set_num_threads(1)
    asked: dict[str, Setting] = {
        "model": "tiny",
        "aggregation": way,
        "rank": RANK,
        "context": CONTEXT,
        "batch_size": BATCH,
        "max_steps": STEPS,
        "epochs": 1000,
        "lr": lr,
    }
    order = build_order(
        {
            "task": "lora",
            "rounds": rounds,
            "quorum": PEERS,
            "seed": seed,
            "outlier-limit": 0.0,
            "weighting": "equal",
            "set": [f"{name}={value}" for name, value in asked.items()],
        }
    )
    with tempfile.TemporaryDirectory(prefix="commonweight-quality-") as path:
        folder = Path(path)
        data = parts(folder, hub)
        losses: list[float] = []
        first = Lora()
        first.load(data[0])
        start = Weights(first.init(seed, order.spec.settings))
        before = first.evaluate(start, order.spec.settings, lambda *_: None).metrics["loss"]
        with fleet_of(data) as fleet:
            run = fleet.run(
                order.spec, lambda closed: losses.append(round(closed.metrics["loss"] or 0, 4))
            )
            head = weights.load(fleet.lane.version_path(run.head))
        assert not any(closed.refused for closed in run.history)
        off, cut = inexactness(data, head, {**order.spec.settings, "seed": seed})
    return {
        "way": way,
        "seed": seed,
        "lr": lr,
        "rounds": rounds,
        "first_loss": round(float(before), 4),
        "losses": losses,
        "bytes_up": run.history[-1].bytes_up // PEERS,
        "bytes_down": head.nbytes,
        "off": off,
        "cut": cut,
        "seconds": round(time.monotonic() - began),
    }


def inexactness(
    data: list[DataSettings], head: Weights, settings: dict[str, Setting]
) -> tuple[float, float]:
    """How far the next version is from the mean of the peers' products, and how much of that mean
    a truncation leaves out; both beside the change of the products in that round."""
    updates, products, changes = [], [], []
    for each in data:
        task = Lora()
        task.load(each)
        trained = Weights(task.train(head, settings | {"round": 99}, lambda *_: None).weights)
        updates.append(trained)
        products.append(products_of(task, trained, settings))
    codec = registry.parse(build_codec(settings))
    share, scale = [1 / len(data)] * len(data), [1.0] * len(data)
    opened = [registry.open_update(codec, one, codec.base(head)) for one in updates]
    if factors.is_factored(head.schema) and codec.rank:
        kept = [one for one in opened if isinstance(one, FactoredUpdate)]
        pieces = svd.aggregate(kept, share, scale, head)
    else:
        pieces = averaging.average(opened, share, scale, head, lambda mean: mean)
    arrays = {part.name: array for piece in pieces for part, array in piece.items()}
    version = Weights({n: array.reshape(head[n].shape) for n, array in arrays.items()})
    found, base = products_of(task, version, settings), products_of(task, head, settings)
    adds = any(name.endswith(DELTA) for name in head)
    off = cut = whole = 0.0
    for layer, now in found.items():
        mean = np.mean([one[layer] for one in products], axis=0) + (base[layer] if adds else 0.0)
        changes.append(np.linalg.norm(mean - base[layer]) ** 2)
        off += float(np.linalg.norm(now - mean) ** 2)
        whole += float(changes[-1])
        if settings["aggregation"] == "svd":
            stacked = svd.stack(layer, list(zip(updates, share, strict=True)))
            part = svd.truncate(*stacked, RANK).error
            cut += float((part * np.linalg.norm(mean)) ** 2)
    return float(np.sqrt(off / whole)), float(np.sqrt(cut / whole))


def build_codec(settings: dict[str, Setting]) -> str:
    """That of a run with these settings."""
    return f"factors:{RANK}" if settings["aggregation"] in ("stack", "svd") else "fp32"


def products_of(task: Lora, held: Weights, settings: dict[str, Setting]) -> Products:
    """What adapters, or a version, add to each layer: float64[out, in]."""
    if any(name.endswith(DELTA) for name in held):
        return {
            name.removesuffix(DELTA): array.astype(np.float64)
            for name, array in held.items()
            if name.endswith(DELTA)
        }
    if settings["aggregation"] in ("stack", "svd"):
        return {
            name.removesuffix(A): held[name.removesuffix(A) + B].astype(np.float64)
            @ held[name].astype(np.float64)
            for name in held
            if name.endswith(A)
        }
    model = task._adapted(task._read(settings))
    for name, tensor in model.tensors().items():
        tensor.data.copy_(torch.from_numpy(np.array(held[name])))
    return {
        name: layer.scaling["default"]
        * layer.lora_B["default"].weight.detach().double().numpy()
        @ layer.lora_A["default"].weight.detach().double().numpy()
        for name, layer in model.model.named_modules()
        if hasattr(layer, "lora_A")
    }


def read() -> list[dict[str, Any]]:
    """The earlier results; empty if there is no file."""
    found: list[dict[str, Any]] = (
        json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.adapters", description=__doc__
    )
    parser.add_argument("--way", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--seed", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--lr", type=float, help="another learning rate; prints only")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="commonweight-quality-") as folder:
        for seed in asked.seed:
            make_model(Path(folder) / str(seed) / "tiny", seed)
            _measure_all(Path(folder) / str(seed), seed, asked)


def _measure_all(hub: Path, seed: int, asked: argparse.Namespace) -> None:
    for way in asked.way:
        rows = read()
        key = {"way": way, "seed": seed, "lr": LR, "rounds": asked.rounds}
        if not asked.lr and any(key.items() <= row.items() for row in rows):
            continue
        row = measured(hub, way, seed, asked.lr or LR, asked.rounds)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if not asked.lr:
            rows = sorted([*read(), row], key=lambda r: (WAYS.index(r["way"]), r["seed"]))
            body = ",\n".join(map(json.dumps, rows))
            RESULTS.write_text(f'{{"rows": [\n{body}\n]}}\n')


if __name__ == "__main__":
    main()
