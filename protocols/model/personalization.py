"""What of a model its versions hold: all of it, less what stays at home, more what travels beside.

Three schemes are the trainers' matter and no task's. SCAFFOLD's control variates (arXiv 1910.06378)
travel as extra tensors of the version, one for each that is trained: so they are averaged, checked,
coded and kept like weights. Tensors that stay at home (FedBN, arXiv 2102.07623) are in no version
at all. An optimiser that goes on from round to round (DiLoCo, arXiv 2311.08105) stays at home too,
beside the model. All are told by settings that every trainer obeys and no task sees. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import numpy as np

from protocols.errors import UsageError
from protocols.model.weights import DTYPES, FLOAT_DTYPES, Array, Schema, TensorSpec, Weights

#: The setting that asks for control variates: SCAFFOLD's option, 1 or 2; 3: they do not travel up.
SCAFFOLD = "scaffold"
#: With option 3, the metric by which a peer tells its learning rate times its steps.
LR_TIMES_STEPS = "path"
#: The setting that names tensors which stay at home: patterns such as "norm*", with commas between.
PERSONAL_LAYERS = "at_home"
#: The setting by which a peer's optimiser goes on where its last round left it.
KEEP_OPTIMIZER = "keep_optimiser"
SETTINGS = frozenset({SCAFFOLD, PERSONAL_LAYERS, KEEP_OPTIMIZER})
#: Begins the name of a control variate; and of one that no update holds, as it follows from it.
CONTROL_PREFIX, DERIVED_PREFIX = "control:", "control:="

Settings = Mapping[str, str | int | float | bool]


def control_name(name: str, settings: Settings) -> str:
    """The name of the control variate that belongs to a tensor."""
    return (DERIVED_PREFIX if settings.get(SCAFFOLD) == 3 else CONTROL_PREFIX) + name


def is_control(name: str) -> bool:
    return name.startswith(CONTROL_PREFIX)


def is_derived(name: str) -> bool:
    """True for a control variate that no update holds."""
    return name.startswith(DERIVED_PREFIX)


def is_personal(name: str, settings: Settings) -> bool:
    """True for a tensor that stays at home."""
    patterns = str(settings.get(PERSONAL_LAYERS, "")).split(",")
    return any(fnmatchcase(name, pattern.strip()) for pattern in patterns)


def control_schema(schema: Schema, settings: Settings) -> Schema:
    """The control variates of a model: float32, or float64 where the tensor is that."""
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
    """The schema of a run's versions. Raises UsageError if nothing of the model would travel."""
    travels = {name: spec for name, spec in model.items() if not is_personal(name, settings)}
    if not travels:
        raise UsageError(
            f"every tensor of the model stays at home ({settings[PERSONAL_LAYERS]})",
            "patterns that leave something to share, such as *norm*",
        )
    return travels | control_schema(travels, settings)


def first_version(model: Weights, settings: Settings) -> Weights:
    """First weights as a run's versions hold them: every control variate is zero."""
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
    """Weights of this schema."""
    bf16 = [name for name, spec in schema.items() if spec.dtype == "BF16"]
    return Weights({name: array_of(name) for name in schema}, bf16)
