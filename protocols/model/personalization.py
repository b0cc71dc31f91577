"""The tensors of a version: those of the model, without personal layers, with control variates.

The trainer handles three schemes; tasks do not know about them. SCAFFOLD's control variates (arXiv
1910.06378) are extra tensors of the version, one for each trained tensor, so they are averaged,
checked, compressed and stored like weights. Personal layers (FedBN, arXiv 2102.07623) stay on the
machine and are in no version. Optimizer state that is kept from round to round (DiLoCo, arXiv
2311.08105) also stays on the machine. Settings of the run select them. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import numpy as np

from protocols.errors import UsageError
from protocols.model.weights import (
    DTYPES,
    FLOAT_DTYPES,
    Array,
    Schema,
    TensorSpec,
    Weights,
    bf16_names,
)

#: The setting for control variates: SCAFFOLD's option 1 or 2; with 3 updates do not contain them.
SCAFFOLD = "scaffold"
#: With option 3, the metric with a peer's learning rate times its number of steps.
LR_TIMES_STEPS = "path"
#: The setting that names the personal layers: patterns such as "norm*", separated by commas.
PERSONAL_LAYERS = "at_home"
#: The setting by which a peer keeps its optimizer state from round to round.
KEEP_OPTIMIZER = "keep_optimiser"
SETTINGS = frozenset({SCAFFOLD, PERSONAL_LAYERS, KEEP_OPTIMIZER})
#: Prefixes of the names of control variates, and of those that are computed from an update.
CONTROL_PREFIX, DERIVED_PREFIX = "control:", "control:="

Settings = Mapping[str, str | int | float | bool]


def control_name(name: str, settings: Settings) -> str:
    """The name of the control variate of a tensor."""
    return (DERIVED_PREFIX if settings.get(SCAFFOLD) == 3 else CONTROL_PREFIX) + name


def is_control(name: str) -> bool:
    return name.startswith(CONTROL_PREFIX)


def is_derived(name: str) -> bool:
    """True for a control variate that updates do not contain."""
    return name.startswith(DERIVED_PREFIX)


def is_personal(name: str, settings: Settings) -> bool:
    """True for a tensor that stays on the machine."""
    patterns = str(settings.get(PERSONAL_LAYERS, "")).split(",")
    return any(fnmatchcase(name, pattern.strip()) for pattern in patterns)


def control_schema(schema: Schema, settings: Settings) -> Schema:
    """The schema of a model's control variates: float64 for float64 tensors, else float32."""
    if not settings.get(SCAFFOLD):
        return {}
    return {
        control_name(name, settings): TensorSpec(
            "F64" if spec.dtype == "F64" else "F32", spec.shape
        )
        for name, spec in schema.items()
        if spec.dtype in FLOAT_DTYPES
    }


def shared_schema(model: Schema, settings: Settings) -> Schema:
    """The schema of a run's versions. Raises UsageError if there is no tensor to share."""
    if not model:
        raise UsageError("the model of this task has no tensors, so there is nothing to train")
    shared = {name: spec for name, spec in model.items() if not is_personal(name, settings)}
    if not shared:
        raise UsageError(
            f"all tensors of the model stay on the machine ({settings[PERSONAL_LAYERS]})",
            "use patterns that leave tensors to share, such as *norm*",
        )
    return shared | control_schema(shared, settings)


def first_version(model: Weights, settings: Settings) -> Weights:
    """The first version of a run from a model: without personal layers, control variates zero."""
    schema = shared_schema({n: s for n, s in model.schema.items() if not is_control(n)}, settings)
    return build_weights(
        schema,
        lambda name: (
            np.zeros(schema[name].shape, DTYPES[schema[name].dtype])
            if is_control(name)
            else model[name]
        ),
    )


def without_controls(version: Weights) -> Weights:
    """The model in a version."""
    return build_weights(
        {n: s for n, s in version.schema.items() if not is_control(n)}, version.__getitem__
    )


def build_weights(schema: Schema, array_of: Callable[[str], Array]) -> Weights:
    """Weights of this schema from a function that returns the array of each tensor."""
    return Weights({name: array_of(name) for name in schema}, bf16_names(schema))
