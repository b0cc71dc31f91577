"""DiLoCo beside an exchange at every step, at equal tokens: a small GPT on Python's own manual.

`python -m tests.quality.language dp|diloco|fedavg [--warm N] [--steps N] [--inner H] [--codec C]`

The text is that of `pydoc_data.topics`, which ships with Python: its topics are dealt to the peers,
and of each peer's windows every tenth is held out. "dp" is what exchanging gradients at every step
computes: one AdamW on the mean gradient of all peers' batches; each step would send one model up
and one down for each peer. Both see the same number of tokens with the same learning rate, which
falls to 0 over the run as half a cosine, and both begin where one peer alone came to in `--warm`
steps (the paper, too, begins with a model that was trained before).
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agent.tasks import DataSettings, Setting, next_token
from agent.tasks.seeds import seed_of
from agent.tasks.text_lm import TextLM, logits_of, shape_of
from coordinator.facts import RunSpec
from protocols.weights import Weights
from tests.quality.fleet import fleet_of

PEERS = 4
SEED = 1
BATCH = 16
MODEL: dict[str, Setting] = {"layers": 2, "heads": 4, "width": 64, "context": 64}


def parts(folder: Path) -> list[DataSettings]:
    """Each peer's folder of text: every fourth topic."""
    topics = sorted(pydoc_data.topics.topics.items())
    made = []
    for peer in range(PEERS):
        mine = folder / str(peer)
        mine.mkdir()
        for name, text in topics[peer::PEERS]:
            (mine / f"{name}.txt").write_text(text)
        made.append(DataSettings(index=peer, parts=PEERS, path=str(mine), device="cpu"))
    return made


def loss_on_held_out(tasks: list[TextLM], model: Weights) -> float:
    """Nats a token over all peers' held-out windows."""
    found = [task.evaluate(model, {**MODEL, "batch_size": 64}, lambda *_: None) for task in tasks]
    return sum(n * m["loss"] for n, m, *_ in found) / sum(n for n, *_ in found)


def warmed(data: list[DataSettings], steps: int, lr: float) -> Weights:
    """The first weights after so many steps of the first peer alone. Nothing is exchanged."""
    first = TextLM().init(SEED, MODEL)
    if not steps:
        return first
    task = TextLM()
    task.load(data[0])
    settings = {**_local(steps, lr), "seed": SEED, "round": 0}
    return Weights(task.train(first, settings, lambda *_: None)[0])


def _local(steps: int, lr: float) -> dict[str, Setting]:
    return {**MODEL, "batch_size": BATCH, "max_steps": steps, "epochs": 1000, "lr": lr}


def every_step(
    data: list[DataSettings], first: Weights, steps: int, every: int, lr: float
) -> list[float]:
    """Held-out losses, each after `every` steps of AdamW on the mean of all peers' gradients."""
    torch.set_num_threads(1)
    tasks = [TextLM() for _ in data]
    for task, mine in zip(tasks, data, strict=True):
        task.load(mine)
    windows = [task._read(MODEL) for task in tasks]
    shape = shape_of(MODEL)
    w = {name: torch.tensor(array) for name, array in first.items()}
    losses_of = [
        next_token.loss_of(lambda t, x, training: logits_of(shape, t, x, training), found)
        for found in windows
    ]
    optimiser = torch.optim.AdamW([t.requires_grad_() for t in w.values()], lr=lr, weight_decay=0.0)
    orders: list[Tensor] = [torch.empty(0, dtype=torch.int64) for _ in data]
    chance = torch.Generator().manual_seed(seed_of("every step", SEED))
    told = []
    for step in range(1, steps + 1):
        # As the trainers have it: one rate for each round of so many steps.
        passed = (step - 1) // every * every / steps
        optimiser.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * passed)) / 2
        optimiser.zero_grad()
        for peer, found in enumerate(windows):
            if len(orders[peer]) < BATCH:
                fresh = torch.randperm(len(found.train), generator=chance)
                orders[peer] = torch.cat([orders[peer], fresh])
            rows, orders[peer] = orders[peer][:BATCH], orders[peer][BATCH:]
            starts = found.train[rows]
            (losses_of[peer](w, starts, starts) / len(data)).backward()
        optimiser.step()
        if step % every == 0:
            arrays = {name: t.detach().numpy() for name, t in w.items()}
            told.append(loss_on_held_out(tasks, Weights(arrays)))
            print(f"step {step}: {told[-1]:.4f}", file=sys.stderr, flush=True)
    return told


def by_rounds(
    data: list[DataSettings],
    first: Weights,
    strategy: str,
    steps: int,
    inner: int,
    lr: float,
    codec: str,
    **more: Any,
) -> dict[str, Any]:
    """Held-out losses by round, and the bytes that went up and would go up at every step."""
    rounds = steps // inner
    spec = RunSpec(
        task="text-lm",
        rounds=rounds,
        seed=SEED,
        quorum=PEERS,
        codec=codec,
        strategy=strategy,
        strategy_args=more,
        weighting="equal",
        settings={**_local(inner, lr), "lr_schedule": "cosine", "lr_rounds": rounds},
    )
    losses: list[float] = []
    with fleet_of(data) as fleet:

        def note(closed: Any) -> None:
            losses.append(closed.metrics["loss"])
            print(f"round {closed.round}: {losses[-1]:.4f}", file=sys.stderr, flush=True)

        run = fleet.run(spec, note, first)
        model_bytes = fleet.lane.version(run.head).stat().st_size
    bytes_up = sum(closed.bytes_up for closed in run.history)
    return {
        "losses": losses,
        "bytes_up": bytes_up,
        "times_fewer": round(model_bytes * PEERS * steps / bytes_up, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.quality.language", description=__doc__)
    parser.add_argument("arm", choices=("dp", "diloco", "fedavg"))
    parser.add_argument("--warm", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--inner", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--codec", default="fp32")
    parser.add_argument("--outer", nargs="*", default=[], metavar="NAME=NUMBER")
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="commonweight-quality-") as folder:
        data = parts(Path(folder))
        first = warmed(data, asked.warm, asked.lr)
        if asked.arm == "dp":
            found: Any = {"losses": every_step(data, first, asked.steps, asked.inner, asked.lr)}
        else:
            outer = {n: float(v) for n, v in (word.split("=") for word in asked.outer)}
            found = by_rounds(
                data, first, asked.arm, asked.steps, asked.inner, asked.lr, asked.codec, **outer
            )
    print(json.dumps({**vars(asked), **found, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
