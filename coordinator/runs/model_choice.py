"""Chooses the models of a run of `model=auto`, by scores that its peers tell before round 1. Pure.

Each peer compares the models by a cross-validation over its own rows. A run without a number
of rounds trains all models that are not clearly worse, one after the other (`runs.candidates`), as
the fleet has more rows than a peer. A run with a number of rounds trains the one with the best
mean.

In a run with noise, no score may show what noise hides. In a secure run, the score of a single peer
would leave in clear, and there is no version yet whose evaluation could be summed. So both have no
scores. If one model must be chosen, a rule chooses it from the statistics of the tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from msgspec.structs import replace

from coordinator.runs import best_version, spec_rules, steps
from coordinator.runs.run_length import with_trees
from coordinator.runs.state import Run
from coordinator.runs.steps import count_peers
from coordinator.storage.run_events import ModelChosen, RunSpec
from coordinator.strategies import personal
from protocols.errors import SETTINGS_CODES, UNDECIDED_CODES, CommonweightError
from protocols.tables import preprocessing
from protocols.tables.model_scores import MAX_ASKED, MODELS, Model, ModelScores

#: How long a comparison may take. A slower peer takes part in the run, but not in the choice.
DEADLINE_S = 90.0
#: If all peers together have this many rows, a secure run trains trees.
TREE_ROWS = 2_000
#: Refusals of peers whose version of the agent is too old to compare models.
_OLDER = SETTINGS_CODES | {"bad description"}
#: Reasons to refuse an answer that does not belong to this request.
_NOT_NOW = frozenset(
    {"late", "replay", "not asked", "wrong base", "another run", "another fleet", "bad signature"}
)
#: A model is not trained if its loss is over MAX_LOSS times the least one and its accuracy is
#: lower by more than MAX_ERRORS standard errors. The loss alone does not decide: losses of models
#: that are hardly ever wrong differ widely.
MAX_LOSS, MAX_ERRORS = 1.5, 2
#: Metrics that are errors in the units of the target, or their squares; and the least error.
_ERRORS, _TINY = frozenset({"rmse", "mae", "mse"}), 1e-12
SHOWN = {"rmse": "RMSE", "mae": "MAE", "mse": "MSE"}


def with_model(spec: RunSpec, model: Model) -> RunSpec:
    """The settings of the run with this model. Raises UsageError if trees do not fit them."""
    spec = replace(spec, settings={**spec.settings, "model": model})
    return with_trees(spec) if model == "trees" else spec


def fitting_models(spec: RunSpec) -> tuple[tuple[Model, ...], dict[Model, str]]:
    """The models that fit the run's options, and why the others do not."""
    fitting: list[Model] = []
    left_out: dict[Model, str] = {}
    for model in MODELS:
        try:
            spec_rules.check(with_model(spec, model))
            fitting.append(model)
        except CommonweightError as err:
            left_out[model] = err.message[:400]
    return tuple(fitting), left_out


def decide(
    run: Run,
    eligible: Set[str],
    decided: Set[str],
    deadline_passed: bool,
    wait: steps.Wait | None = None,
) -> steps.AskPeers | steps.Wait | steps.ChooseModel:
    """The next step of a run that compares models. `decided`: peers whose owners have decided.
    `wait`: the wait for owners who have not; None if all have decided."""
    if _no_scores(run.spec) or len(fitting_models(run.spec)[0]) < 2:
        return steps.ChooseModel()

    def rows_first(peer: str) -> tuple[int, str]:
        return -run.declared.get(peer, (0, 0))[0], peer

    new = sorted(eligible - run.peers.keys(), key=rows_first)[: max(0, MAX_ASKED - len(run.peers))]
    back = {peer for peer in eligible if run.peers.get(peer) == "lost"}
    if not deadline_passed and (to_ask := back | decided | set(new)):
        return steps.AskPeers(tuple(sorted(to_ask)), opens_phase=not run.peers)
    if run.pending and not deadline_passed:
        return steps.Wait(f"a comparison of models by {count_peers(len(run.pending))}", run.pending)
    nobody_answered = not (run.scores or run.declared)
    return wait if wait is not None and nobody_answered else steps.ChooseModel()


#: What operators read about trees in a run without secure sums.
NO_HESSIANS = "without --secure, no hessians leave the peers, which costs trees some accuracy"


def is_missing(run: Run, kind: str, reason: str) -> bool:
    """True if a refused request asked for scores, so that the peer lacks nothing but scores.

    Reasons that apply to every request do not count: an owner's consent is missing, or the answer
    belongs to another request.
    """
    return run.comparing and kind == "describe" and reason not in UNDECIDED_CODES | _NOT_NOW


def choose(run: Run) -> ModelChosen:
    """The model, or the first of several ones, and the settings of the run from then on."""
    fitting, left_out = fitting_models(run.spec)
    fitting = fitting or ("linear",)
    if any(reason in _OLDER for reason in run.scores_missing.values()) and "trees" in fitting:
        fitting = tuple(model for model in fitting if model != "trees")
        left_out["trees"] = "an agent is too old for them"
    told = {peer: one for peer, one in sorted(run.scores.items()) if one.rows}
    because = _no_scores(run.spec)
    if not because and len(fitting) == 1:
        because = "the only model that fits"
    if not because:
        for model in fitting:
            if lacks := [peer for peer, one in told.items() if model not in one.metrics]:
                left_out[model] = f"{count_peers(len(lacks))} cannot train it"
        compared = tuple(model for model in fitting if model not in left_out)
        if (metric := _metric(run.spec, compared, told)) and compared:
            return _best(run, metric, compared, told, left_out)
        because = "no peer told scores"
    if takes_turns(run.spec) or len(fitting) == 1:
        return _chosen(run.spec, fitting, left_out=left_out, because=because)
    model, rule = _by_rule(run, fitting)
    why = "; ".join(filter(None, (because, rule)))
    return _chosen(run.spec, (model,), left_out=left_out, because=why)


def takes_turns(spec: RunSpec) -> bool:
    """True if the run trains several models.

    Such a run ends when no version is better, its evaluations say which model is best, and its
    peers keep no part of a model, which the next model would get.
    """
    return bool(spec.patience) and spec.measures and not personal.trainer_settings(spec)


def _chosen(spec: RunSpec, models: Sequence[Model], **more: Any) -> ModelChosen:
    model, *then = models
    return ModelChosen(model=model, spec=with_model(spec, model), then=tuple(then), **more)


def _no_scores(spec: RunSpec) -> str:
    """Why no peer is asked for scores; empty if they are."""
    if not spec.measures:
        return "with noise no score leaves a peer, and linear models need the least noise"
    return "in a secure run no score of a single peer leaves" if spec.secure else ""


def _by_rule(run: Run, fitting: tuple[Model, ...]) -> tuple[Model, str]:
    """The model that is chosen without scores, and the rule."""
    if not run.spec.measures:
        return "linear", ""
    rows = sum(train for train, _ in run.declared.values())
    if not rows:
        return "linear", "the number of rows is not known"
    if "trees" in fitting and rows >= TREE_ROWS:
        return "trees", f"{rows:,} rows, trees from {TREE_ROWS:,}"
    told = f"{rows:,} rows" + (f", trees from {TREE_ROWS:,}" if "trees" in fitting else "")
    # On few rows, perceptrons overfit classes, and linear models are too simple for most numbers
    # (docs/tables.md).
    if run.spec.secure and "mlp" in fitting and not _target(run).classes:
        return "mlp", f"{told}; mlp for numbers"
    return "linear", told


def _target(run: Run) -> preprocessing.Target:
    """What the run predicts, as the peers' tables agree on it."""
    made = run.preprocessing or str(run.spec.settings["preprocessing"])
    return preprocessing.decode(made).target


def _metric(spec: RunSpec, models: tuple[Model, ...], told: Mapping[str, ModelScores]) -> str:
    """The metric that decides: that of the run, if every score has it, else the default; empty
    without scores."""
    found = [one.metrics[model] for one in told.values() for model in models]
    names = {name for name in (found[0] if found else ()) if _all_have(found, name)}
    wanted = best_version.plain_name(spec.best_metric)
    chosen = next((n for n in (wanted, *best_version.DEFAULT_METRICS) if n in names), "")
    # The root of the mean square tells the same as the loss, in the units of the target.
    return "rmse" if chosen == "loss" and "rmse" in names else chosen


def _all_have(found: list[dict[str, float | None]], name: str) -> bool:
    return all((value := one.get(name)) is not None and math.isfinite(value) for one in found)


def _best(
    run: Run,
    metric: str,
    models: tuple[Model, ...],
    told: Mapping[str, ModelScores],
    left_out: dict[Model, str],
) -> ModelChosen:
    rows = sum(one.rows for one in told.values())
    means = {model: _mean(metric, model, told) for model in models}
    spec = run.spec
    judged = replace(spec, best_metric=metric, best_direction=_direction(spec, metric))
    model = max(models, key=lambda one: best_version.score(judged, {metric: means[one]}))
    found = [one.metrics[model] for one in told.values() for model in models]
    if metric == "accuracy" and not spec.best_metric and _all_have(found, "loss"):
        # Accuracies within a standard error are equal, and the loss tells them apart.
        least = means[model] - math.sqrt(means[model] * (1 - means[model]) / rows)
        near = [one for one in models if means[one] >= least]
        model = min(near, key=lambda one: _mean("loss", one, told))
    models = _in_contention(model, models, told, left_out) if takes_turns(spec) else (model,)
    return _chosen(
        spec,
        models,
        metric=metric,
        scores=means,
        rows=rows,
        peers=tuple(told),
        left_out=left_out,
    )


def _in_contention(
    best: Model,
    models: Sequence[Model],
    told: Mapping[str, ModelScores],
    left_out: dict[Model, str],
) -> tuple[Model, ...]:
    """The models that the fleet may train best. `left_out` gets the others."""
    found = [one.metrics[model] for one in told.values() for model in models]
    if _all_have(found, "rmse"):
        losses = {model: _mean("rmse", model, told) ** 2 for model in models}
    elif _all_have(found, "loss"):
        losses = {model: _mean("loss", model, told) for model in models}
    else:
        return tuple(models)
    least = max(min(losses.values()), _TINY)
    worse = set(models) - {best}
    if _all_have(found, "accuracy"):
        accuracies = {model: _mean("accuracy", model, told) for model in models}
        most, rows = max(accuracies.values()), sum(one.rows for one in told.values())
        enough = most - MAX_ERRORS * math.sqrt(most * (1 - most) / rows)
        worse = {model for model in worse if accuracies[model] < enough}
    for model in models:
        if model in worse and losses[model] > MAX_LOSS * least:
            times = losses[model] / least
            left_out[model] = f"its loss in the cross-validation is {times:.3g} times the least"
    return tuple(model for model in models if model not in left_out)


def _mean(metric: str, model: Model, told: Mapping[str, ModelScores]) -> float:
    """The mean, weighted by rows; the geometric mean for errors in the units of the target.

    With a geometric mean, a model with relatively smaller errors at most peers is better. In a sum
    of squares, the few rows with the largest errors would decide.
    """
    rows = sum(one.rows for one in told.values())
    values = [(one.rows / rows, float(one.metrics[model][metric] or 0)) for one in told.values()]
    if metric in _ERRORS:
        return math.exp(sum(share * math.log(max(value, _TINY)) for share, value in values))
    return sum(share * value for share, value in values)


def _direction(spec: RunSpec, metric: str) -> str:
    return spec.best_direction if best_version.plain_name(spec.best_metric) == metric else ""


def line(chosen: ModelChosen) -> str:
    """What operators read: `text`, and that it is the model."""
    return f"model: {text(chosen)}"


def text(chosen: ModelChosen) -> str:
    """The model and its score, those of the others, and what was left out."""
    models = (chosen.model, *chosen.then)
    if chosen.scores:
        shown = SHOWN.get(chosen.metric, chosen.metric)
        others = [f"{name} {chosen.scores[name]:.4g}" for name in MODELS[::-1]
                  if name in chosen.scores and name != chosen.model]  # fmt: skip
        parts = [f"{shown} {chosen.scores[chosen.model]:.4g}", ", ".join(others)]
        parts.append(f"{count_peers(len(chosen.peers))}, {chosen.rows:,} rows")
    else:
        parts = [chosen.because]
    if chosen.then:
        parts[0] = f"each peer alone: {chosen.model} {parts[0]}" if chosen.scores else parts[0]
    said = f"{', then '.join(models)} ({'; '.join(filter(None, parts))})"
    if "trees" in models and not chosen.spec.secure:
        said += f"; {NO_HESSIANS}"
    for name, why in sorted(chosen.left_out.items()):
        said += f"; {name} left out: {why}"
    return said
