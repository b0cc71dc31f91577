"""Lets worker processes of a task, as of a DataLoader, return tensors without Unix sockets.

torch passes the memory of a tensor over such a socket, which the sandbox refuses: the worker would
hang. In the sandbox, tensors on the CPU travel as bytes through the existing pipe.
"""

from __future__ import annotations

import sys
from functools import partial
from multiprocessing import reduction
from typing import Any


def copy_tensors() -> None:
    """Replaces torch's functions that pass tensors in `multiprocessing`: these pass bytes."""
    register: Any = reduction.register

    def register_ours(kind: type, reduce: Any) -> None:
        is_tensors = getattr(reduce, "__module__", "") == "torch.multiprocessing.reductions"
        if is_tensors and reduce.__name__ == "reduce_tensor":
            reduce = partial(_reduce, reduce)
        register(kind, reduce)

    reduction.register = register_ours  # type: ignore[assignment]


def _reduce(of_torch: Any, tensor: Any) -> Any:
    if tensor.device.type != "cpu" or tensor.layout is not sys.modules["torch"].strided:
        return of_torch(tensor)
    plain = tensor.detach().contiguous().reshape(-1)
    raw = plain.view(sys.modules["torch"].uint8).numpy().tobytes()
    return _tensor, (raw, str(tensor.dtype), tuple(tensor.shape), tensor.requires_grad)


def _tensor(raw: bytes, dtype: str, shape: tuple[int, ...], requires_grad: bool) -> Any:
    import importlib

    torch = importlib.import_module("torch")
    kind = getattr(torch, dtype.removeprefix("torch."))
    flat = torch.frombuffer(bytearray(raw), dtype=kind) if raw else torch.empty(0, dtype=kind)
    return flat.reshape(shape).requires_grad_(requires_grad)
