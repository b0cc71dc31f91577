"""The tensors of any `nn.Module`, by the names of its state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from protocols.errors import TaskUnusable
from protocols.model.weights import Array, Schema, TensorSpec

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def checked(model: Any) -> nn.Module:
    """What a user's `model` gives. Raises TaskUnusable if that is no module."""
    if isinstance(model, nn.Module):
        return model
    raise TaskUnusable(
        f"model() gives a {type(model).__name__}, and no nn.Module", "return the model"
    )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers themselves; a tied one once, by its first name.

    Raises TaskUnusable for what a version cannot have.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise TaskUnusable(
                f"the model keeps a {type(tensor).__name__} as {name}, which no version can have",
                "keep it in a buffer: self.register_buffer(name, tensor)",
            )
        if is_lazy(tensor):
            raise TaskUnusable(f"the size of {name} is not known", "no lazy layers: give sizes")
        if tensor.dtype not in _CODES:
            raise TaskUnusable(f"the tensor {name} has the unsupported dtype {tensor.dtype}")
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def buffers_of(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """The floating-point tensors that are no parameters, such as running statistics."""
    return frozenset(
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not isinstance(tensor, nn.Parameter)
    )


def frozen_of(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """The parameters that are not trained."""
    return frozenset(
        name
        for name, tensor in tensors.items()
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    )


def schema_of(tensors: Mapping[str, Tensor]) -> Schema:
    """Their names, dtypes and shapes."""
    return {
        name: TensorSpec(_CODES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


@torch.no_grad()
def load_tensors(tensors: Mapping[str, Tensor], weights: Mapping[str, Array]) -> None:
    """Copy a version into these tensors; bfloat16 as the uint16 of `Weights`."""
    for name, tensor in tensors.items():
        bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        if bits.is_cpu:  # without a second copy
            bits.detach().numpy()[...] = weights[name]
        else:
            bits.copy_(torch.tensor(weights[name]))


def call(model: Any, x: Any) -> Any:
    """The output for a batch of inputs: a tensor, a tuple of arguments, or a dict of keywords."""
    if isinstance(x, tuple):
        return model(*x)
    return model(**x) if isinstance(x, Mapping) else model(x)
