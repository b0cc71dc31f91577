"""Checks this machine's Python packages and the device that torch would train on."""

from __future__ import annotations

import sys
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

from protocols import VERSION
from protocols.errors import CommonweightError
from protocols.local.programs import run_program

_TORCH_LOAD_S = 120.0

_DEVICE_SCRIPT = """
import sys
import torch
chosen, cards = sys.argv[1], torch.cuda.device_count()
kind, _, number = chosen.partition(":")
if kind in ("auto", "cuda") and int(number or 0) < cards:
    print(f"{number and chosen or kind}:", torch.cuda.get_device_name(int(number or 0)), end="")
elif kind in ("auto", "mps") and torch.backends.mps.is_available():
    print("mps", end="")
elif kind in ("auto", "cpu"):
    print("cpu" if kind == "cpu" else "cpu, no GPU that torch can use", end="")
else:
    sys.exit(f"torch cannot use {chosen}: it finds {cards} cards")
print(f", torch {torch.__version__}")
"""


def check_packages() -> str:
    """Check that `agent` and `protocols` are ours: other distributions may use these names."""
    import agent
    import protocols

    ours = [Path(str(module.__file__)).parent.parent for module in (agent, protocols)]
    owners = packages_distributions()
    foreign = {
        owner
        for name in ("agent", "protocols")
        for owner in owners.get(name, [])
        if owner != "commonweight"
    }
    if foreign or ours[0] != ours[1]:
        whose = ", ".join(sorted(foreign)) or f"{ours[0]} and {ours[1]}"
        raise CommonweightError(
            f"two packages named agent or protocols: {whose}",
            "install commonweight in an environment of its own: pipx install commonweight",
        )
    return f"commonweight {VERSION} in {ours[0]}, Python {sys.version.split()[0]}"


def check_device(chosen: str) -> str:
    """The device that torch trains on for the owner's setting `chosen`, found by a child process:
    this one never imports torch. Raises CommonweightError."""
    if find_spec("torch") is None:
        raise CommonweightError(
            "torch is not installed, so that only tasks without it can run",
            "pip install 'commonweight[agent]'",
        )
    return (
        run_program(
            [sys.executable, "-P", "-c", _DEVICE_SCRIPT, chosen],
            "no device to train on",
            within_s=_TORCH_LOAD_S,
            hint="check the GPU and its driver, install torch again, or: "
            "commonweight-agent policy set device auto",
        )
        .decode()
        .strip()
    )
