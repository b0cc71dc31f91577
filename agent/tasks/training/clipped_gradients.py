"""The sum of the gradients of single examples, each clipped (Abadi et al. 2016, section 3.1).

If every trained tensor is the weight or bias of one `F.linear` over rows, the norm of an example's
gradient follows from the layer's input and the gradient of its output, and no gradient of a single
example is made ("ghost norms", Goodfellow 2015, arXiv 1510.01799). Otherwise `torch.func.vmap`
makes them, some examples at a time; so for tied weights, convolutions and embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from protocols.errors import UsageError

Tensors = dict[str, Tensor]
#: The loss of each example: `losses_of(weights, x, y) -> float32[n]`.
LossesOf = Callable[[Tensors, Tensor, Tensor], Tensor]

#: Gradients of single examples in memory at a time, in bytes; at least one example.
_CHUNK_BYTES = 64 * 1024 * 1024
#: Examples whose activations are in memory at a time.
_MAX_ROWS = 4096
#: Float32 must not make a clipped gradient longer than the clip.
_ROUNDING, _TINY = 1 + 1e-5, 1e-12
#: Words of torch's errors for a model that needs several examples, or cannot be mapped over them.
_OF_BATCHES = ("vmap", "batch", "per channel when training")


class _Call(NamedTuple):
    """One `F.linear`: the names of its weight and bias, its input and its output."""

    weight: str
    bias: str
    x: Tensor
    out: Tensor


class _LinearCalls(TorchFunctionMode):
    """Records each `F.linear` with a trained weight, and if trained tensors have other uses."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names, self.calls, self.has_others = names, list[_Call](), False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        used = {id(leaf) for leaf in tree_leaves((args, kwargs))} & self._names.keys()
        if func is F.linear and not kwargs and args[0].dim() == 2 and id(args[1]) in used:
            x, weight, bias = (*args, None)[:3]
            self.calls.append(_Call(self._names[id(weight)], self._names.get(id(bias), ""), x, out))
            used -= {id(weight), id(bias)}
        self.has_others |= bool(used)
        return out


class ClippedGradients:
    """Sums of clipped gradients of `losses_of` by the tensors `trained`.

    `is_separate`: `losses_of` computes each loss from one example alone, so this is not checked,
    and the model may be random (dropout).
    """

    def __init__(
        self, losses_of: LossesOf, trained: Sequence[str], clip: float, is_separate: bool = False
    ) -> None:
        self._losses_of, self._trained, self._clip = losses_of, list(trained), clip
        self._is_linear: bool | None = False if is_separate else None

    def sum(self, w: Tensors, x: Tensor, y: Tensor) -> Tensors:
        """The sum over the examples x [n, …], y [n], float32 by tensor; zeros for no example.

        Raises UsageError for a model in which examples depend on each other.
        """
        total = {name: torch.zeros_like(w[name]) for name in self._trained}
        if not len(y):
            return total
        if self._is_linear is None:
            self._check_independent(w, x, y)
            self._is_linear = self._find_linear(w, x[:2], y[:2])
        size = _MAX_ROWS if self._is_linear else self._chunk(w)
        for xs, ys in zip(torch.split(x, size), torch.split(y, size), strict=True):
            found = self._ghost(w, xs, ys) if self._is_linear else self._by_vmap(w, xs, ys)
            for name, gradient in found.items():
                total[name] += gradient
        return total

    def _chunk(self, w: Tensors) -> int:
        nbytes = sum(w[name].nbytes for name in self._trained)
        return max(1, min(256, _CHUNK_BYTES // max(nbytes, 1)))

    def _check_independent(self, w: Tensors, x: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            try:
                all_losses = self._losses_of(w, x[:8], y[:8])
                alone = torch.cat(
                    [self._losses_of(w, x[i : i + 1], y[i : i + 1]) for i in range(len(y[:8]))]
                )
            except (RuntimeError, ValueError) as err:  # such as batch normalization of one example
                raise examples_depend() from err
        if all_losses.shape != alone.shape or not torch.allclose(
            all_losses, alone, rtol=1e-3, atol=1e-4, equal_nan=True
        ):
            raise examples_depend()

    def _record(self, w: Tensors, x: Tensor, y: Tensor) -> tuple[Tensor, _LinearCalls]:
        watched = {**w, **{name: w[name].detach().requires_grad_() for name in self._trained}}
        names = {id(watched[name]): name for name in self._trained}
        with torch.enable_grad(), _LinearCalls(names) as mode:
            losses = self._losses_of(watched, x, y)
        return losses, mode

    def _find_linear(self, w: Tensors, x: Tensor, y: Tensor) -> bool:
        """True if each trained tensor is used by exactly one `F.linear`, and by nothing else."""
        _, seen = self._record(w, x, y)
        calls = seen.calls
        used = sorted(name for call in calls for name in (call.weight, call.bias) if name)
        if seen.has_others or used != sorted(self._trained):
            return False
        if any(len(call.x) != len(y) for call in calls):
            return False
        ghost = self._ghost(w, x, y)
        exact = self._by_vmap(w, x, y)
        return all(torch.allclose(ghost[name], exact[name], rtol=1e-3, atol=1e-5) for name in exact)

    def _ghost(self, w: Tensors, x: Tensor, y: Tensor) -> Tensors:
        losses, seen = self._record(w, x, y)
        calls = seen.calls
        deltas = torch.autograd.grad(losses.sum(), [call.out for call in calls])
        inputs = [call.x.detach() for call in calls]
        squares = torch.zeros_like(losses)
        for call, a, delta in zip(calls, inputs, deltas, strict=True):
            squares += delta.square().sum(1) * (a.square().sum(1) + bool(call.bias))
        factor = self._factor(squares)
        found: Tensors = {}
        for call, a, delta in zip(calls, inputs, deltas, strict=True):
            scaled = _scaled(delta, factor)
            found[call.weight] = scaled.T @ _scaled(a, factor > 0)
            if call.bias:
                found[call.bias] = scaled.sum(0)
        return found

    def _by_vmap(self, w: Tensors, x: Tensor, y: Tensor) -> Tensors:
        fixed = {name: tensor.detach() for name, tensor in w.items()}

        def loss(trained: Tensors, x_one: Tensor, y_one: Tensor) -> Tensor:
            return self._losses_of({**fixed, **trained}, x_one[None], y_one[None]).sum()

        gradient_of = torch.func.vmap(
            torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different"
        )
        try:
            found: Tensors = gradient_of({name: fixed[name] for name in self._trained}, x, y)
        except (RuntimeError, ValueError) as err:
            if any(word in str(err).lower() for word in _OF_BATCHES):
                raise examples_depend() from err
            raise
        squares = torch.stack([g.flatten(1).square().sum(1) for g in found.values()]).sum(0)
        factor = self._factor(squares)
        return {name: _scaled(g, factor).sum(0) for name, g in found.items()}

    def _factor(self, squares: Tensor) -> Tensor:
        """The factor that limits each gradient's norm to `clip`; 0 for one that is not finite."""
        factor = (self._clip / (squares.sqrt() * _ROUNDING + _TINY)).clamp(max=1.0)
        return torch.where(squares.isfinite(), factor, torch.zeros_like(factor))


def _scaled(rows: Tensor, factor: Tensor) -> Tensor:
    """Rows [n, …] times float32[n]; 0 where the factor is, also for rows that are not finite."""
    by = factor.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(by > 0, rows * by, torch.zeros_like(rows))


def examples_depend() -> UsageError:
    """The error for a model in which the examples of a batch depend on each other."""
    return UsageError(
        "--dp needs a model that processes each example independently, and this model does not, "
        "for example because of batch normalization",
        "use group normalization: for images --set norm=group (resnet18), or layers without norm",
    )
