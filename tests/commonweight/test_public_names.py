"""The public names of `import commonweight`: they stay, and importing them takes little."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

import commonweight as cw
from protocols import VERSION, errors
from tests.support.fleet_harness import ROOT

#: The public names with their signatures, or None for modules and values. A change here is one for
#: users: see docs/api.md on what stays.
NAMES = {
    "Analysis": "(rows: tuple[Mapping[str, Any], ...], label: str, left_out: Mapping[str, str], "
    "tables: Mapping[str, tuple[Mapping[str, Any], ...]] = <factory>, "
    "notes: tuple[str, ...] = ()) -> None",
    "Analysis.frame": "(self, table: str = '') -> pd.DataFrame",
    "Analysis.notes": None,
    "Fleet": "(home: Path, timeout_s: float = 15.0) -> None",
    "Fleet.analyze": "(self, question: str, where: str = '', *, epsilon: float = 0.0, "
    "bounds: Mapping[str, tuple[float, float]] = {}, deadline: str = '10m', "
    "secure: bool = False) -> Analysis",
    "Fleet.close": "(self) -> None",
    "Fleet.measure": "(self, *models: str, task: str = '', min_group: int = 10, "
    "deadline: str = '10m') -> Measurement",
    "Fleet.peers": "(self) -> list[Peer]",
    "Fleet.run": "(self, name: str) -> Run",
    "Fleet.runs": "(self) -> list[Run]",
    "Fleet.scatter": "(self, rows: Rows, out: str | Path, *, model: str = 'best', "
    "task: str = '', quorum: int = 1) -> int",
    "Fleet.train": "(self, task: str | type, **options: Any) -> Run",
    "Fleet.role": None,
    "KerasTask": "() -> None",
    "KerasTask.answers": "(self, output: Any, settings: Any) -> Mapping[str, Sequence[Any]]",
    "KerasTask.build": "(self, settings: RunSettings) -> Any",
    "KerasTask.data": "(self, source: DataSettings, settings: Any) -> tuple[Any, Any]",
    "KerasTask.defaults": None,
    "KerasTask.inputs": "(self, path: str, settings: Any) -> Any",
    "KerasTask.make_optimizer": "(self, model: Any, settings: RunSettings) -> Any",
    "KerasTask.model": "(self, settings: Any) -> Any",
    "KerasTask.optimizer": "(self, model: Any, settings: Any) -> Any",
    "KerasTask.predict": "(self, weights: Weights, settings: RunSettings, source: str) -> "
    "Iterator[Mapping[str, Sequence[Any]]]",
    "KerasTask.read": "(self, data: DataSettings, settings: RunSettings) -> Examples",
    "KerasTask.version": None,
    "Measurement": "(scores: tuple[Score, ...], "
    "weighted: Mapping[str, Mapping[str, float | None]], "
    "excused: Mapping[str, str]) -> None",
    "Measurement.frame": "(self) -> pd.DataFrame",
    "Peer": "(id: str, name: str, state: str, reason: str, standing: str, "
    "labels: Mapping[str, str]) -> None",
    "Round": "(number: int, metrics: Mapping[str, float | None], peers: tuple[str, ...], "
    "digest: str, num_examples: int, seconds: float, bytes_up: int, bytes_down: int) -> None",
    "Run": "(remote: Remote, run_id: str) -> None",
    "Run.best": None,
    "Run.comparisons": None,
    "Run.export": "(self, path: str | Path, which: str = 'best') -> str",
    "Run.frame": "(self) -> pd.DataFrame",
    "Run.history": None,
    "Run.options": None,
    "Run.plot": "(self, *metrics: str, ax: Axes | None = None) -> Axes",
    "Run.predict": "(self, rows: Rows, which: str = 'best', *, task: str | type = '') "
    "-> list[dict[str, Any]]",
    "Run.resume": "(self) -> None",
    "Run.rounds": "(self, *, every_s: float = 0.5) -> Iterator[Round]",
    "Run.state": None,
    "Run.state_dict": "(self, which: str = 'best') -> dict[str, torch.Tensor]",
    "Run.stop": "(self) -> None",
    "Run.wait": "(self) -> Run",
    "Score": "(peer: str, model: str, metric: str, value: float | None, num_examples: int) -> None",
    "SklearnTask": "() -> None",
    "SklearnTask.Settings": None,
    "SklearnTask.classes": None,
    "SklearnTask.count_examples": "(self, settings: RunSettings) -> tuple[int, int]",
    "SklearnTask.data": "(self, source: DataSettings, settings: Any) -> tuple[Any, Any]",
    "SklearnTask.defaults": None,
    "SklearnTask.evaluate": "(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> "
    "EvalOutcome",
    "SklearnTask.init": "(self, seed: int, settings: RunSettings) -> Weights",
    "SklearnTask.inputs": "(self, path: str, settings: Any) -> Any",
    "SklearnTask.load": "(self, data: DataSettings) -> None",
    "SklearnTask.metrics": "(self, model: Any, x: Numbers, y: Numbers) -> Mapping[str, float]",
    "SklearnTask.model": "(self, settings: Any) -> Any",
    "SklearnTask.predict": "(self, weights: Weights, settings: RunSettings, source: str) -> "
    "Iterator[Mapping[str, Sequence[Any]]]",
    "SklearnTask.schema": "(self, settings: RunSettings) -> Schema",
    "SklearnTask.setting_specs": "(self) -> Mapping[str, SettingSpec]",
    "SklearnTask.train": "(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> "
    "TrainOutcome",
    "SklearnTask.version": None,
    "TorchTask": "() -> None",
    "TorchTask.answers": "(self, output: Any, settings: Any) -> Mapping[str, Sequence[Any]]",
    "TorchTask.count_examples": "(self, settings: RunSettings) -> tuple[int, int]",
    "TorchTask.data": "(self, source: DataSettings, settings: Any) -> tuple[Any, Any]",
    "TorchTask.defaults": None,
    "TorchTask.evaluate": "(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> "
    "EvalOutcome",
    "TorchTask.example": "(self, settings: Any) -> Tensor",
    "TorchTask.export": "(self, weights: Weights, settings: RunSettings, form: str, "
    "data: DataSettings, out: Path) -> None",
    "TorchTask.forms": None,
    "TorchTask.gradient": "(self, weights: Weights, settings: RunSettings) -> Mapping[str, Array]",
    "TorchTask.init": "(self, seed: int, settings: RunSettings) -> Weights",
    "TorchTask.inputs": "(self, path: str, settings: Any) -> Any",
    "TorchTask.loss": "(self, output: Any, target: Any) -> Tensor",
    "TorchTask.lr_times_steps": "(self, settings: RunSettings) -> float",
    "TorchTask.metrics": "(self, output: Any, target: Any) -> Mapping[str, Any]",
    "TorchTask.model": "(self, settings: Any) -> nn.Module",
    "TorchTask.optimizer": "(self, model: nn.Module, settings: Any) -> torch.optim.Optimizer | "
    "None",
    "TorchTask.predict": "(self, weights: Weights, settings: RunSettings, source: str) -> "
    "Iterator[Mapping[str, Sequence[Any]]]",
    "TorchTask.schema": "(self, settings: RunSettings) -> Schema",
    "TorchTask.train": "(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> "
    "TrainOutcome",
    "TorchTask.traits": "(self, settings: RunSettings) -> Mapping[str, Sequence[str]]",
    "TorchTask.version": None,
    "__version__": None,
    "connect": "(home: str | Path | None = None, *, timeout_s: float = 15.0) -> Fleet",
    "errors": None,
    "join": "(ticket: str, *, name: str = '') -> Fleet",
    "pictures": "(source: DataSettings, classes: Sequence[str], *, size: int = 64, "
    "channels: int = 3) -> tuple[PictureSet, PictureSet]",
    "simulate": "(task: str | type, peers: int = 10, *, per_round: int = 0, split: str = '', "
    "dropout: float = 0.0, workers: int = 0, ray: str = '', owner: Mapping[str, Any] = {}, "
    "out: str | Path | None = None, **options: Any) -> Run",
}


def run_python(code: str) -> str:
    return subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT, timeout=60)


def found_names() -> Iterator[tuple[str, str | None]]:
    for name in cw.__all__:
        if name == "KerasTask" and find_spec("keras") is None:
            continue  # tests/extras/tensorflow compares it
        found = getattr(cw, name)
        yield name, signature(found) if callable(found) else None
        if inspect.isclass(found):
            for member, value in vars(found).items():
                if not member.startswith("_"):
                    is_method = inspect.isfunction(value)
                    yield f"{name}.{member}", signature(value) if is_method else None


def signature(found: Any) -> str:
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(found)))


def test_the_public_names_and_signatures_stay() -> None:
    found = dict(found_names())
    absent = "" if "KerasTask" in found else "KerasTask"
    assert found == {n: words for n, words in NAMES.items() if n.partition(".")[0] != absent}


def test_a_name_that_is_not_there_is_an_error_of_python() -> None:
    assert set(cw.__all__) <= set(dir(cw))
    assert cw.__version__ == VERSION
    assert cw.errors is errors
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        _ = cw.conect  # type: ignore[attr-defined]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import commonweight; "
        "print(*sorted(set(sys.modules) - before))"
    )
    loaded = {name.partition(".")[0] for name in run_python(code).split()}
    assert loaded - sys.stdlib_module_names == {"commonweight"}
    assert "asyncio" not in loaded


def test_the_command_is_also_a_module() -> None:
    words = [sys.executable, "-P", "-m", "commonweight", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, VERSION), done.stderr
