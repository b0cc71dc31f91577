"""DiLoCo beside an exchange at every step, at equal tokens: a small GPT on Python's own words.

`python -m benchmarks.quality.language [--arm every-step|diloco] [--seed N…] [--inner H] [--codec C]
[--optimiser adamw|muon] …`

The text is the documentation that ships with Python: the topics of its manual in `pydoc_data`, and
the docstrings of its library. Both are dealt to the peers, a topic or module at a time, and of each
peer's windows every tenth is held out. "every-step" is what exchanging gradients at
every step computes: one optimizer on the mean gradient of all peers' batches; each step would send
one model up and one down for each peer. Both see the same number of tokens. The learning rate rises
over the first rounds and falls to 0 over the run as half a cosine. Both begin where one peer alone
came to in `--warm` steps of AdamW (the paper, too, begins with a model that was trained before).
What was measured is in `docs/quality/language.json`, and is not measured again.
"""

from __future__ import annotations

import argparse
import ast
import json
import pydoc_data.topics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agent.data.settings import DataSettings
from agent.tasks import Setting
from agent.tasks.language.gpt import TextLM
from agent.tasks.training import module_state
from agent.tasks.training.hyperparameters import read_hyperparameters
from agent.tasks.training.muon import muon_with_adamw
from agent.tasks.training.seeds import derive_seed
from benchmarks.quality.fleet import fleet_of
from coordinator.runs.state import Round
from coordinator.storage.run_events import RunSpec
from protocols.model.weights import Weights

PEERS = 4
BATCH = 16
MODEL: dict[str, Setting] = {"layers": 2, "heads": 4, "width": 64, "context": 64}
WARM_LR = 2e-3
#: At every step 0.008 and 0.012 are alike and better than 0.005; by rounds 0.005 beats 0.008.
LR = {"every-step": 1e-2, "diloco": 6e-3, "fedavg": 6e-3}
OUTER = ("server_learning_rate=1.0", "server_momentum=0.7")
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "quality" / "language.json"


class Way(NamedTuple):
    """How it is trained: `steps` of each peer, after `warm` of the first one alone; an exchange
    after every `inner` (with "every-step": an evaluation). `warmup` is in rounds of so many."""

    arm: str
    seed: int
    warm: int
    steps: int
    inner: int
    lr: float
    warmup: int
    codec: str
    outer: tuple[str, ...]
    optimiser: str = "adamw"

    @property
    def rounds(self) -> int:
        return self.steps // self.inner

    @property
    def evaluate_every(self) -> int:
        """Rounds: an evaluation takes as long as many steps."""
        return max(1, self.rounds // 10)

    def settings(self) -> dict[str, Setting]:
        """Those of a run."""
        whole = {
            "lr_schedule": "cosine",
            "lr_rounds": self.rounds,
            "warmup_rounds": self.warmup,
        }
        return {**_local(self.inner, self.lr), **whole, "optimiser": self.optimiser}


def texts() -> list[str]:
    """The texts of all topics and of the docstrings of all modules, by name."""
    found = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    library = Path(sysconfig.get_paths()["stdlib"])
    for module in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(module.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(module.read_bytes())
        except SyntaxError:  # a file that is not valid Python on purpose
            continue
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        told = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        found.append("\n\n".join(text for text in told if text))
    return [text for text in found if text]


def parts(folder: Path) -> list[DataSettings]:
    """The folder of text of each peer: every fourth text."""
    dealt, made = texts(), []
    for peer in range(PEERS):
        mine = folder / str(peer)
        mine.mkdir()
        for number, text in enumerate(dealt[peer::PEERS]):
            (mine / f"{number:05}.txt").write_text(text)
        made.append(DataSettings(index=peer, parts=PEERS, path=str(mine), device="cpu"))
    return made


def loss_on_held_out(tasks: list[TextLM], model: Weights) -> float:
    """Nats per token over all peers' held-out windows."""
    found = [task.evaluate(model, {**MODEL, "batch_size": 64}, lambda *_: None) for task in tasks]
    return sum(n * m["loss"] for n, m, *_ in found) / sum(n for n, *_ in found)


def warmed(data: list[DataSettings], way: Way) -> Weights:
    """The first weights after some steps of the first peer alone, without exchange."""
    first = TextLM().init(way.seed, MODEL)
    if not way.warm:
        return first
    task = TextLM()
    task.load(data[0])
    settings = {**_local(way.warm, WARM_LR), "seed": way.seed, "round": 0}
    return Weights(task.train(first, settings, lambda *_: None)[0])


def _local(steps: int, lr: float) -> dict[str, Setting]:
    return {**MODEL, "batch_size": BATCH, "max_steps": steps, "epochs": 1000, "lr": lr}


def every_step(data: list[DataSettings], first: Weights, way: Way) -> dict[str, Any]:
    """Held-out losses during training on the mean of all peers' gradients."""
    torch.set_num_threads(1)
    tasks = [TextLM() for _ in data]
    for task, mine in zip(tasks, data, strict=True):
        task.load(mine)
    found = [task._source(MODEL, 0) for task in tasks]
    model = tasks[0]._build(MODEL)
    module_state.load_tensors(module_state.tensors_of(model), first)
    optimizer = _optimizer(model, way)
    orders: list[Tensor] = [torch.empty(0, dtype=torch.int64) for _ in data]
    chance = torch.Generator().manual_seed(derive_seed("every step", way.seed))
    losses: list[float] = []
    for number in range(1, way.rounds + 1):
        plan = read_hyperparameters({**way.settings(), "round": number}, TextLM.defaults)
        for group in optimizer.param_groups:
            group["lr"] = plan.lr
        for _ in range(way.inner):
            optimizer.zero_grad()
            for peer, examples in enumerate(found):
                if len(orders[peer]) < BATCH:
                    fresh = torch.randperm(examples.size, generator=chance)
                    orders[peer] = torch.cat([orders[peer], fresh])
                rows, orders[peer] = orders[peer][:BATCH], orders[peer][BATCH:]
                ((x, y),) = examples.batches(rows, BATCH)
                (tasks[0].loss(model(x), y) / len(data)).backward()
            optimizer.step()
        if number % way.evaluate_every and number < way.rounds:
            continue
        arrays = {name: t.detach().numpy() for name, t in module_state.tensors_of(model).items()}
        losses.append(_told(number, loss_on_held_out(tasks, Weights(arrays))))
    return {"losses": losses}


def _optimizer(model: torch.nn.Module, way: Way) -> torch.optim.Optimizer:
    if way.optimiser == "muon":
        plan = read_hyperparameters({**way.settings(), "round": 1}, TextLM.defaults)
        return muon_with_adamw(model, plan)
    return torch.optim.AdamW(model.parameters(), lr=way.lr, weight_decay=0.0)


def by_rounds(data: list[DataSettings], first: Weights, way: Way, **more: Any) -> dict[str, Any]:
    """Held-out losses by round; how many times fewer bytes went up, and up and down, than if a
    model went up and one down for each peer at every step. `more`: further options of the run."""
    spec = RunSpec(
        task="text-lm",
        rounds=way.rounds,
        seed=way.seed,
        quorum=PEERS,
        codec=way.codec,
        strategy=way.arm,
        strategy_args={name: float(value) for name, _, value in map(_parted, way.outer)},
        weighting="equal",
        evaluate_every=way.evaluate_every,
        settings=way.settings(),
        **more,
    )
    losses: list[float] = []

    def note(closed: Round) -> None:
        if (loss := closed.metrics.get("loss")) is not None and closed.num_evaluated:
            losses.append(_told(closed.round, loss))

    with fleet_of(data) as fleet:
        run = fleet.run(spec, note, first)
        model = fleet.lane.version_path(run.head).stat().st_size
    assert not any(closed.refused for closed in run.history)
    up, down = sum(closed.bytes_up for closed in run.history), model * PEERS * way.rounds
    whole = model * PEERS * way.steps
    return {
        "losses": losses,
        "bytes_up": up,
        "fewer_up": round(whole / up, 1),
        "fewer": round(2 * whole / (up + down), 1),
    }


def _parted(text: str) -> tuple[str, str, str]:
    return text.partition("=")


def _told(number: int, loss: float | None) -> float:
    assert loss is not None
    print(f"round {number}: {loss:.4f}", file=sys.stderr, flush=True)
    return round(loss, 4)


def measured(way: Way) -> dict[str, Any]:
    """A row of the results."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="commonweight-quality-") as folder:
        data = parts(Path(folder))
        first = warmed(data, way)
        found = (every_step if way.arm == "every-step" else by_rounds)(data, first, way)
    return {**way._asdict(), **found, "seconds": round(time.monotonic() - began)}


def read() -> dict[Way, dict[str, Any]]:
    """The earlier results; empty if there is no file."""
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    return {_way(**{name: row[name] for name in Way._fields}): row for row in rows}


def _way(**of: Any) -> Way:
    none = {"outer": (), "codec": "fp32"} if of["arm"] == "every-step" else {}
    return Way(**{**of, "outer": tuple(of["outer"]), **none})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.language", description=__doc__
    )
    arms = ("every-step", "diloco", "fedavg")
    parser.add_argument("--arm", nargs="+", default=arms[:2], choices=arms)
    parser.add_argument("--seed", nargs="+", type=int, default=[1])
    parser.add_argument("--warm", type=int, default=400)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--inner", type=int, default=26)
    parser.add_argument("--lr", type=float, help="instead of the arm's own")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--optimiser", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--outer", nargs="*", default=OUTER, metavar="NAME=NUMBER")
    asked = vars(parser.parse_args())
    have = read()
    ways = [
        _way(**{**asked, "arm": arm, "seed": seed, "lr": asked["lr"] or LR[arm]})
        for seed in asked["seed"]
        for arm in asked["arm"]
    ]
    for way in ways:
        if way not in have:
            have[way] = measured(way)
            body = ",\n".join(json.dumps(row) for _, row in sorted(have.items()))
            RESULTS.write_text(f'{{"rows": [\n{body}\n]}}\n')
        row = have[way]
        fewer = "".join(
            f", {row[name]} times {name}" for name in ("fewer_up", "fewer") if name in row
        )
        print(f"{way.arm}, seed {way.seed}: {row['losses'][-1]:.4f} nats a token{fewer}")


if __name__ == "__main__":
    main()
