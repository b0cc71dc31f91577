"""The precision in which torch computes: what `auto` is, autocast, TF32 and scaled losses.

On a graphics card `auto` is bf16, or fp16 if the card has no bf16. Elsewhere it is fp32. All but
fp32 let the card round the inputs of matrix products and convolutions in fp32 to TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_map

from protocols.errors import UsageError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

#: A context for forward passes, which may be entered again.
Autocast = AbstractContextManager[object]


def resolve(name: str, device: torch.device) -> str:
    """fp32, tf32, bf16 or fp16. Raises UsageError if the device cannot compute so."""
    if device.type != "cuda":
        return "fp32" if name in ("auto", "tf32") else name
    fast = bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "bf16" and not fast:
        raise UsageError("this graphics card has no bf16", "precision=auto or precision=fp32")
    return name if name != "auto" else "bf16" if fast else "fp16"


def use(name: str, device: torch.device) -> Autocast:
    """Allow TF32 or not, as the precision says, and give the context of its forward passes."""
    kind = resolve(name, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind != "fp32"
    if kind not in _DTYPES:
        return nullcontext()
    return torch.autocast(device.type, _DTYPES[kind])


def inference(name: str, device: torch.device, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` for evaluations and predictions: on a graphics card in that precision, with an
    output in fp32; elsewhere `forward` itself."""
    if device.type != "cuda":
        return forward
    context = use(name, device)

    def call(*args: Any) -> Any:
        with context:
            output = forward(*args)
        return tree_map(_widened, output)

    return call


def _widened(leaf: Any) -> Any:
    is_half = isinstance(leaf, torch.Tensor) and leaf.dtype in _DTYPES.values()
    return leaf.float() if is_half else leaf


def make_scaler(
    name: str, device: torch.device, dtypes: Collection[torch.dtype]
) -> torch.amp.GradScaler:
    """Scales the loss of fp16, so that small gradients do not become 0 (Micikevicius et al. 2018,
    arXiv 1710.03740, section 3.2); for others it does nothing. A step with an infinite gradient is
    left out. `dtypes` are those of the trained tensors: it cannot scale for fp16 ones."""
    scales = resolve(name, device) == "fp16" and torch.float16 not in dtypes
    return torch.amp.GradScaler(device.type, enabled=scales)
