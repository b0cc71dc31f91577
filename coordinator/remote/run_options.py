"""What a person typed to start a run, on the command line or in the monitor's form, as an order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from coordinator.remote.durations import seconds
from protocols.errors import UsageFault
from protocols.local import homes

#: A round that sets its own deadline takes no longer than that.
_LONGEST_AUTO_S = 600.0


def order(
    *,
    task: str,
    task_: str,
    target: list[str] | tuple[str, ...] | None,
    kind: str,
    features: str,
    **others: Any,
) -> Any:
    """The order for the options of `start` as they were typed, there or in the monitor's form.

    Raises UsageFault and its kin.
    """
    if bool(task) == bool(task_):
        raise UsageFault("name one task", "commonweight run start mnist")
    column, goal, metric = _targets(list(target or []))
    table = {"target": column, "kind": kind, "features": features}
    chosen = {name: value for name, value in table.items() if value}
    if metric:
        if others.get("best_metric") not in (None, "", metric):
            raise UsageFault(
                f"--target {metric} and --best-metric {others['best_metric']} are two metrics",
                "name one of them",
            )
        others["best_metric"] = metric
    return run_order(task=task or task_, table=chosen, target=goal, **others)


def run_order(
    *,
    task: str,
    rounds: int,
    quorum: int,
    deadline: str,
    strategy: str,
    set_: list[str] | None,
    codec: str,
    seed: int,
    weighting: str,
    max_weight_share: float,
    clip_norm: float,
    from_: Path | None,
    select: str = "",
    late: str = "drop",
    keep_versions: int = 2,
    min_examples: int = 1,
    mode: str = "synchronous",
    buffer: int = 0,
    max_staleness: int = 10,
    concurrency: int = 0,
    server_lr: float = 1.0,
    strategy_arg: list[str] | None = None,
    best_metric: str = "",
    best_direction: str = "",
    patience: int = 0,
    target: float | None = None,
    table: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """The order for these options. Raises UsageFault."""
    from coordinator.api.schema import RunOrder
    from coordinator.storage.run_events import RunSpec
    from protocols.codecs import registry

    registry.find(codec)
    if weighting not in ("examples", "equal"):
        raise UsageFault(f"weighting is examples or equal, not {weighting!r}")
    if late not in ("drop", "fold"):
        raise UsageFault(f"--late is drop or fold, not {late!r}")
    if mode not in ("synchronous", "buffered"):
        raise UsageFault(f"the mode is synchronous or buffered, not {mode!r}")
    if best_direction not in ("", "max", "min"):
        raise UsageFault(f"the best direction is max or min, not {best_direction!r}")
    spec = RunSpec(
        task=_task_name(task),
        rounds=rounds,
        quorum=quorum,
        deadline_s=_LONGEST_AUTO_S if deadline == "auto" else seconds(deadline),
        deadline="auto" if deadline == "auto" else "fixed",
        select=_times(select) if select else 0.0,
        late="fold" if late == "fold" else "drop",
        keep_versions=keep_versions,
        strategy=strategy,
        strategy_args=dict(setting(text) for text in strategy_arg or []),
        settings={**dict(setting(text) for text in set_ or []), **table},
        codec=codec,
        seed=seed,
        weighting="equal" if weighting == "equal" else "examples",
        max_weight_share=max_weight_share,
        clip_norm=clip_norm,
        min_examples=min_examples,
        mode="buffered" if mode == "buffered" else "synchronous",
        buffer=buffer,
        max_staleness=max_staleness,
        concurrency=concurrency,
        server_lr=server_lr,
        handshake=True,
        best_metric=best_metric,
        best_direction=best_direction,  # type: ignore[arg-type]
        patience=patience,
        target=target,
    )
    return RunOrder(spec=spec, from_digest=_adopt(from_) if from_ else "")


def setting(text: str) -> tuple[str, str | int | float | bool]:
    """`key=value` with the value as the number or truth value it looks like. Raises UsageFault."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageFault(f"{text!r} is not key=value")
    if value in ("true", "false"):
        return key, value == "true"
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value


def _targets(given: list[str]) -> tuple[str, float | None, str]:
    """The column, the value of the metric and its name among what was given. Raises UsageFault.

    A metric's value is `0.9` or `macro_f1=0.9`; all else is a column.
    """
    column, goal, metric = "", None, ""
    for text in given:
        name, _, value = text.rpartition("=")
        try:
            goal, metric = float(value), name
        except ValueError:
            if column:
                raise UsageFault(
                    f"{column} and {text} cannot both be predicted", "start two runs"
                ) from None
            column = text
    return column, goal, metric


def _task_name(text: str) -> str:
    """A task's name. Of one in a file only "file.py:Class": each agent has its own copy of it."""
    path, colon, attribute = text.rpartition(":")
    if not (colon and path.endswith(".py")) and ("/" in text or text.endswith(".py")):
        raise UsageFault(f"{text!r} names no task", "write file and class: ./my_task.py:MyTask")
    return f"{Path(path).name}:{attribute}" if colon and path.endswith(".py") else text


def _times(text: str) -> float:
    """`1.2x` or `1.2`. Raises UsageFault."""
    try:
        return float(text.removesuffix("x"))
    except ValueError as err:
        raise UsageFault(f"{text!r} is no factor", "write 1.2x") from err


def _adopt(path: Path) -> str:
    """Put a safetensors file into the home as a version; its digest."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from coordinator.transport.weights import Lane
    from protocols.model.weights import Weights

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as err:
        raise UsageFault(f"cannot read {path} as safetensors: {err}") from err
    return Lane(homes.open_home("coordinator")).commit(Weights(tensors))
