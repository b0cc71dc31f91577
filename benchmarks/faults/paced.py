"""Agents behind lines of their own, with a task whose steps take a fixed time on any machine."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.faults.site import Site
from protocols.local.failpoints import TRUTH
from protocols.model import weights
from protocols.model.weights import Weights
from tests.support.fault_proxy import Proxy
from tests.support.fleet_harness import closing

BYTES_PER_MBIT = 125_000
#: Begins a line in the trainer's log: when a training began and ended (monotonic s), and its steps.
MARK = "trained from"

_SOURCE = '''"""A model of float32 weights that drift; a step takes STEP_S s."""
import sys
import time

import numpy as np

LAYERS, WIDTH = 10, PARAMETERS // 10


class Paced:
    def schema(self, settings):
        return {f"layers.{i}.w": ("F32", (WIDTH // 500, 500)) for i in range(LAYERS)}

    def init(self, seed, settings):
        rng = np.random.default_rng(seed)
        shapes = self.schema(settings).items()
        return {name: rng.normal(0, 0.02, s).astype(np.float32) for name, (_, s) in shapes}

    def load(self, data):
        self.seed = data.index

    def train(self, weights, settings, on_step):
        began, steps = time.monotonic(), int(settings["max_steps"])
        rng = np.random.default_rng((self.seed, int(settings["round"])))
        for step in range(steps):
            time.sleep(STEP_S)
            on_step(step + 1, steps, 1.0, 16 * (step + 1))
        print("MARK", began, time.monotonic(), steps, file=sys.stderr, flush=True)
        moved = lambda w: w + rng.standard_normal(w.shape, np.float32) * np.float32(1e-3)
        return {name: moved(w) for name, w in weights.items()}, 100, {}

    def evaluate(self, weights, settings, on_step):
        return 100, {"loss": 1.0}
'''


class Paced(Site):
    """A fleet whose programs do not write down each step. `paced` is the name of the task."""

    @property
    def paced(self) -> str:
        return f"{self.folder / 'paced.py'}:Paced"

    def _env(self, name: str = "coordinator") -> dict[str, str]:
        return {key: value for key, value in super()._env(name).items() if key != TRUTH}


def paced(parameters: int, step_s: float) -> str:
    """The source of the task."""
    named = {"PARAMETERS": str(parameters), "STEP_S": repr(step_s), "MARK": MARK}
    return re.sub("|".join(named), lambda found: named[found[0]], _SOURCE)


def write_first(parameters: int, path: Path) -> None:
    """The first weights of a model, for a run in which no peer is to upload them."""
    width = parameters // 10
    layer = np.zeros((width // 500, 500), np.float32)
    weights.save(Weights({f"layers.{i}.w": layer for i in range(10)}), path)


@contextlib.contextmanager
def fleet(
    folder: Path, names: Sequence[str], behind: Sequence[str], source: str
) -> Iterator[tuple[Paced, dict[str, Proxy]]]:
    """Agents that have the task, and the lines of those `behind` one. They share no versions."""
    settings = {"COMMONWEIGHT_AGENT_SHARE": "off", "COMMONWEIGHT_AGENT_SANDBOX": "off"}
    made, lines = Paced(folder, settings), dict[str, Proxy]()
    with closing(made), contextlib.ExitStack() as stack:
        made.rise()
        made.join(*names)
        Path(made.paced.removesuffix(":Paced")).write_text(source)
        for seed, name in enumerate(names):
            done = made.ask_agent(name, "task", "add", made.paced)
            assert done.returncode == 0, done.stderr
            if name in behind:
                lines[name] = stack.enter_context(Proxy(made.port, seed=seed))
                made.redirect(name, lines[name].port)
        made.start(*names)
        yield made, lines
