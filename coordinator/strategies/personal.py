"""The option `run start --personal`: how each peer makes a model of its own. Pure.

"finetune" and "ditto" work after the run, on the machine alone. "ditto" keeps the personal model
near the shared one by a proximal term (Li et al. 2021, arXiv 2012.04221, objective h_k with the
final w*). "fedper" keeps the last layers on each machine during the run (Arivazhagan et al. 2019,
arXiv 1912.00818).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from coordinator import strategies
from coordinator.storage.run_spec import RunSpec
from coordinator.strategies import trees
from protocols.errors import UsageError
from protocols.messages.envelope import Setting
from protocols.model import personalization

FINETUNE, DITTO, FEDPER = "finetune", "ditto", "fedper"
#: The weight of Ditto's term, unless the run names one.
DITTO_MU = 1.0
#: The last layers of built-in tasks, as patterns of tensors.
_HEADS = {"tabular": "output.*"}


def check(spec: RunSpec) -> None:
    """Raise UsageError unless peers can do what `spec.personal` asks."""
    kind, _, argument = spec.personal.partition(":")
    if not kind:
        return
    if kind not in (FINETUNE, DITTO, FEDPER) or (kind == FINETUNE and argument):
        raise UsageError(
            f"--personal must be finetune, ditto, ditto:0.1, fedper or fedper:LAYERS, not "
            f"{spec.personal!r}"
        )
    own = strategies.find(spec.strategy).trainer_settings(spec.strategy_args)
    if personalization.PERSONAL_LAYERS in own:
        raise UsageError(
            f"--personal cannot be used with {spec.strategy}, which keeps layers on each machine "
            "itself",
            "leave --personal out, or --strategy fedavg",
        )
    if spec.app:
        raise UsageError(
            "--personal cannot be used with a Flower app, which has its own training",
            "leave --personal out",
        )
    if spec.settings.get("model") == trees.NAME and kind != FINETUNE:
        raise UsageError(
            f"--personal {kind} cannot be used with trees, which have no weights to keep near "
            "others, and no layers",
            "--personal finetune: further trees on each machine",
        )
    mu_of(spec)
    if kind == FEDPER:
        _check_fedper(spec, argument)


def _check_fedper(spec: RunSpec, layers: str) -> None:
    if spec.secure:
        raise UsageError(
            "--secure cannot be used with --personal fedper, which keeps state for each peer",
            "--personal finetune or ditto",
        )
    if spec.task == "tabular" and spec.settings.get("model") != "mlp":
        raise UsageError(
            "--personal fedper needs a model with layers, and a linear model has one",
            "--set model=mlp, or --personal finetune",
        )
    if not (layers or spec.task in _HEADS):
        raise UsageError(
            f"--personal fedper must name the last layers of {spec.task}, as patterns of tensors",
            "such as --personal 'fedper:head.*,classifier.*'",
        )


def mu_of(spec: RunSpec) -> float:
    """The weight of the proximal term of personal models; 0 without. Raises UsageError."""
    kind, _, argument = spec.personal.partition(":")
    if kind != DITTO:
        return 0.0
    try:
        mu = float(argument) if argument else DITTO_MU
    except ValueError:
        mu = math.nan
    if not 0 < mu <= 1000:
        raise UsageError(
            f"the weight of ditto must be above 0 and at most 1000, not {argument!r}",
            "--personal ditto:0.1",
        )
    return mu


def trainer_settings(spec: RunSpec) -> Mapping[str, Setting]:
    """Settings of this run for every trainer, hidden from tasks: those of its strategy, and the
    layers that stay on the machine."""
    own = strategies.find(spec.strategy).trainer_settings(spec.strategy_args)
    kind, _, layers = spec.personal.partition(":")
    if kind != FEDPER:
        return own
    return {**own, personalization.PERSONAL_LAYERS: layers or _HEADS.get(spec.task, "")}
