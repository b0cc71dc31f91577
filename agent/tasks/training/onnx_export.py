"""Exports a torch model to ONNX, and compares its output with torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agent.tasks.training.loop_state import Tensors
from protocols.errors import CommonweightError, UsageError
from protocols.extras import needs_extra
from protocols.model.weights import Array

ONNX = "onnx"


class _Net(nn.Module):
    """Wraps a function of weights in a module that has the weights as parameters."""

    def __init__(
        self, logits_of: Callable[[Tensors, Tensor], Tensor], weights: Mapping[str, Array]
    ) -> None:
        super().__init__()
        self._logits_of = logits_of
        for name, array in weights.items():
            *path, leaf = name.split(".")
            at: nn.Module = self
            for step in path:
                if not hasattr(at, step):
                    at.add_module(step, nn.Module())
                at = getattr(at, step)
            at.register_parameter(leaf, nn.Parameter(torch.tensor(array), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return self._logits_of(dict(self.named_parameters()), x)


def read_example(example: Callable[[Any], Tensor], settings: Any) -> Tensor:
    """The inputs that a user's task gives for an export. Raises UsageError without data."""
    try:
        return example(settings).cpu()
    except FileNotFoundError as err:
        raise UsageError(
            "an export needs two inputs of the model, and there are no data to take them from",
            "commonweight-agent policy set data PATH, or a method example(settings) in the task",
        ) from err


def export(
    logits_of: Callable[[Tensors, Tensor], Tensor],
    weights: Mapping[str, Array],
    example: Tensor,
    out: Path,
    *,
    sides: Mapping[int, torch.export.Dim] | None = None,
) -> None:
    """Write the model, from the input "x" to the output "logits".

    `example` is an input of two examples or more; `sides` are its dynamic dimensions, by default
    the first. The outputs of onnxruntime and torch for `example` are compared. Raises
    MissingPackage without the extra, CommonweightError if the outputs differ.
    """
    free = sides or {0: torch.export.Dim("n")}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    net = _Net(logits_of, weights).eval()
    with needs_extra("onnx", "ONNX"):
        import onnxruntime

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                net,
                (example,),
                dynamo=True,
                verbose=False,
                input_names=["x"],
                output_names=["logits"],
                dynamic_shapes=(free,),
            )
    assert made is not None
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        made.save(temporary)
        session = onnxruntime.InferenceSession(temporary)
        (found,) = session.run(None, {"x": example.numpy()})
        if not np.allclose(found, net(example).numpy(), rtol=1e-2, atol=1e-3):
            raise CommonweightError(
                "the ONNX model does not give what torch gives", "another version of onnxruntime"
            )
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
