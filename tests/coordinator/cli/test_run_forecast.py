"""What `run start` says of the models of a run, before it starts."""

from __future__ import annotations

from coordinator.cli import run_forecast
from coordinator.remote import run_options
from coordinator.runs.state import Round, Run
from coordinator.storage.run_events import RunSpec


def order(**more: object) -> RunSpec:
    typed = {"task": "tabular", "target": "ill", "quorum": 3, **more}
    return run_options.build_order(run_options.from_keywords(typed)).spec


def test_a_run_of_several_models_says_how_many_rounds_it_may_take() -> None:
    spec = order(set={"trees": 50, "depth": 4})
    (line,) = run_forecast.model_lines(spec, None)
    assert line.startswith("models: linear, then mlp, then trees; at most 100, 100, 201 rounds")
    closed = (Round(round=1, digest="", seconds=70.0), Round(round=2, digest="", seconds=21.0))
    before = Run(id="tabular-1", spec=spec, history=closed)
    *_, last = run_forecast.model_lines(spec, before)
    assert last == "the rounds of the last such run, tabular-1, took 2 min in all"


def test_only_models_that_fit_the_options_are_named() -> None:
    (line,) = run_forecast.model_lines(order(strategy="fedadam"), None)
    assert line.startswith("models: linear, then mlp; at most 100, 100 rounds")
