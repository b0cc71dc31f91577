"""python -m benchmarks.quality.privacy_tables [--table NAME…] [--epsilon E…] [--seed N…] [--choose]

Measures ε against accuracy for the task `tabular`, as `privacy` does for digits: without noise,
with noise of each peer's own, and with noise that peers share. A fifth of the rows are at no peer:
the accuracy is that of the last version on them. The scales of columns are public
(`--preprocessing`), and each owner's limit is the ε of the run, so nothing leaves without noise.

`--choose` chooses the settings again, by a simulation on random splits of the rows of peers.
The table "flchain" is in scikit-survival: pip install --no-deps scikit-survival
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
from msgspec.structs import replace

from agent.data import features
from agent.data.admission import HELD_OUT_OF
from agent.data.settings import DataSettings
from agent.tasks.tabular import Tabular
from benchmarks.quality import page
from benchmarks.quality.fleet import fleet_of
from benchmarks.quality.privacy import DELTA, OUT, SEEDS, Course, keep_row, read_rows
from benchmarks.quality.tables import TABLES, Table
from coordinator.storage.run_events import RunSpec
from protocols.errors import CommonweightError
from protocols.model import weights
from protocols.privacy.private_training import PrivateTraining
from protocols.tables import preprocessing

_MOMENTUM = 0.9
#: Stands for no noise.
NO_NOISE = 0.0


#: By table, and whether the noise is shared; then by ε. From `--choose`.
COURSES: dict[tuple[str, bool], dict[float, Course]] = {
    ("breast cancer", False): {
        NO_NOISE: Course(40, 1.0, 0.0625),
        1.0: Course(80, 0.5, 0.0625),
        3.0: Course(80, 0.25, 0.25),
        8.0: Course(80, 1.0, 0.25),
    },
    ("breast cancer", True): {
        1.0: Course(80, 0.25, 0.25),
        3.0: Course(40, 0.5, 0.25),
        8.0: Course(80, 0.25, 1.0),
    },
    ("flchain", False): {
        NO_NOISE: Course(40, 1.0, 0.0625),
        **dict.fromkeys((1.0, 3.0, 8.0), Course(40, 0.25, 1.0)),
    },
    ("flchain", True): dict.fromkeys((1.0, 3.0, 8.0), Course(40, 0.25, 1.0)),
}


def measure(name: str, table: Table, epsilon: float, shared: int, seed: int) -> dict[str, Any]:
    """One run. `shared`: as in `privacy.measure`."""
    began, is_shared = time.monotonic(), shared > 1
    course = COURSES[name, is_shared][epsilon]
    text = preprocessing.encode(table.preprocessing())
    settings: dict[str, str | int | float | bool] = {
        "target": table.target,
        "preprocessing": text,
        "batch_size": 0,
        "epochs": 1,
        "optimiser": "sgd",
        "lr": course.lr,
    }
    spec = RunSpec(
        task="tabular",
        rounds=course.rounds,
        quorum=table.peers,
        seed=seed,
        settings=settings,
        strategy="fedavgm",
        strategy_args={"server_momentum": _MOMENTUM},
        dp_shared=shared if is_shared else 0,
        secure=is_shared,
        deadline_s=3600.0,
        handshake=True,
        dp_epsilon=epsilon,
        dp_delta=DELTA,
        dp_clip=course.clip,
    )
    ours, others = table.split()
    with tempfile.TemporaryDirectory(prefix="commonweight-privacy-") as made:
        folder = Path(made)
        parts = _dealt(ours, table.peers, seed, folder)
        with fleet_of(parts, secure=is_shared) as fleet:
            for peer in fleet.peers.values():
                peer.owner = replace(
                    peer.owner,
                    privacy_max_epsilon=epsilon,
                    privacy_delta=DELTA,
                    privacy_shared="on",
                )
            run = fleet.run(spec)
            if len(run.history) < course.rounds:
                raise CommonweightError(f"the run ended early: {run.ended_because}")
            version = weights.load(fleet.lane.version_path(run.head))
        pa_csv.write_csv(others, folder / "others.csv")
        told = Tabular().predict(version, settings, str(folder / "others.csv"))
        guesses = [guess for batch in told for guess in batch[table.target]]
    truth = others[table.target].to_pylist()
    right = np.mean(np.array(guesses) == np.array(truth))
    most_frequent = max(map(truth.count, table.classes))
    return {
        "table": name,
        "peers": table.peers,
        "epsilon": epsilon,
        **({"shared": shared} if is_shared else {}),
        "seed": seed,
        "rounds": course.rounds,
        "rows": len(ours),
        "others": len(others),
        "most_frequent": round(most_frequent / len(others), 4),
        "accuracy": round(float(right), 4),
        "seconds": round(time.monotonic() - began, 1),
    }


def _dealt(rows: pa.Table, peers: int, seed: int, folder: Path) -> list[DataSettings]:
    order = np.random.default_rng(seed).permutation(len(rows))
    parts = []
    for place, mine in enumerate(np.array_split(order, peers)):
        file = folder / f"peer{place}.csv"
        pa_csv.write_csv(rows.take(mine), file)
        parts.append(DataSettings(path=str(file), index=place, seed=seed, device="cpu"))
    return parts


# --- choosing the settings --------------------------------------------------------------------

#: What is tried.
_CLIPS, _RATES = (0.25, 0.5, 1.0, 2.0), (0.0625, 0.25, 1.0, 4.0, 16.0)
#: Splits of this many rows in all, and at least three.
_SPLIT_ROWS, _MIN_SPLITS = 10_000, 3
Floats = npt.NDArray[np.float64]


def choose(table: Table, epsilon: float, shared: int) -> Iterator[tuple[float, Course]]:
    """Courses and their accuracies, the best first: gradient descent with noise over all rows, as
    the peers of a run do together, on other rows of theirs. The others are not used."""
    ours, _ = table.split()
    x, y = _encoded(ours, table)
    found = []
    for rounds, clip, lr in itertools.product(table.rounds, _CLIPS if epsilon else (1e6,), _RATES):
        std = 0.0
        if epsilon:
            noise = PrivateTraining(epsilon, DELTA, clip, rounds).event(1.0, 1).noise
            std = noise * clip * math.sqrt(table.peers / shared)
        accuracies = []
        for split in range(max(_MIN_SPLITS, _SPLIT_ROWS // len(y))):
            chance = np.random.default_rng(1000 + split)
            order = chance.permutation(len(y))
            cut = len(y) // HELD_OUT_OF
            train, held_out = order[cut:], order[:cut]
            w = _descend(x[train], y[train], rounds, clip, lr, std, chance)
            accuracies.append(np.mean((x[held_out] @ w.T).argmax(1) == y[held_out]))
        found.append((float(np.mean(accuracies)), Course(rounds, clip, lr)))
    yield from sorted(found, reverse=True)


def _encoded(rows: pa.Table, table: Table) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Inputs with a column of ones for each category and for the bias, and classes."""
    made = table.preprocessing()
    (batch,) = rows.combine_chunks().cast(_as_texts(rows)).to_batches()
    numbers, _ = features.input_width(made)
    x = features.encode_inputs(batch, made)
    flags = [np.eye(len(f.categories) + 2)[x[:, numbers + i].astype(int)]
             for i, f in enumerate(made.categorical)]  # fmt: skip
    return (
        np.concatenate([x[:, :numbers], *flags, np.ones((len(x), 1))], 1),
        np.asarray(features.encode_targets(batch, made)),
    )


def _as_texts(rows: pa.Table) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in rows.schema.names])


def _descend(
    x: Floats,
    y: npt.NDArray[np.int64],
    rounds: int,
    clip: float,
    lr: float,
    std: float,
    chance: np.random.Generator,
) -> Floats:
    classes = int(y.max()) + 1
    w = np.zeros((classes, x.shape[1]))
    speed, norms, wanted = np.zeros_like(w), np.linalg.norm(x, axis=1), np.eye(classes)[y]
    for _ in range(rounds):
        z = np.exp((z := x @ w.T) - z.max(1, keepdims=True))
        delta = z / z.sum(1, keepdims=True) - wanted
        longest = np.linalg.norm(delta, axis=1) * norms
        delta *= np.minimum(1, clip / np.maximum(longest, 1e-12))[:, None]
        gradient = delta.T @ x + std * chance.standard_normal(w.shape)
        speed = _MOMENTUM * speed - lr * gradient / len(y)
        w = w + speed
    return w


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.privacy_tables", description=__doc__
    )
    parser.add_argument("--table", choices=sorted(TABLES), nargs="+", default=sorted(TABLES))
    parser.add_argument("--epsilon", type=float, nargs="+", default=(NO_NOISE, 1.0, 3.0, 8.0))
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    for name, epsilon in itertools.product(asked.table, asked.epsilon):
        table = TABLES[name]()
        for shared in (1, table.shared) if epsilon else (1,):
            if asked.choose:
                best = list(itertools.islice(choose(table, epsilon, shared), 3))
                print(name, f"{epsilon:g}", shared, best, flush=True)
                continue
            for seed in asked.seed:
                row = measure(name, table, epsilon, shared, seed)
                print(row, file=sys.stderr, flush=True)
                keep_row(asked.out, row)
    if not asked.choose:
        for name in asked.table:
            print(page.privacy({"rows": read_rows(asked.out)}, name))


if __name__ == "__main__":
    main()
