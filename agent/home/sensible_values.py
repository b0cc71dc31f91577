"""Bounds for settings whose type allows values without sense. Pure.

`policy set` refuses them, and `doctor` reports them in a home that has them already.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from agent.home.settings_schema import AgentSettings


class Largest(NamedTuple):
    """The largest sensible value, and what a larger one means."""

    value: float
    meaning: str


#: As a run's --dp and --delta, whose module an idle agent does not import.
_MAX_EPSILON, _MIN_DELTA = 100.0, 1e-12
_EPSILON = Largest(
    _MAX_EPSILON,
    "with such an ε one row may change the odds of an answer e^100 times and more, which hides "
    "nothing; values up to 10 protect",
)
_NO_LIMIT = "such a value limits nothing; 0 is no limit"
_NO_PART = "with such a value this machine could take part in no run"
_SECONDS = Largest(31 * 86400.0, "that is longer than 31 days")
_LARGEST = {
    "privacy_max_epsilon": _EPSILON,
    "analyze_epsilon": _EPSILON,
    "analyze_epsilon_per_question": _EPSILON,
    "max_lr": Largest(1e3, _NO_LIMIT),
    **dict.fromkeys(("up_mb_a_day", "down_mb_a_day"), Largest(1e9, _NO_LIMIT)),
    **dict.fromkeys(("up_mbit", "down_mbit", "share_mbit_s"), Largest(1e6, _NO_LIMIT)),
    "disk_gb": Largest(1e6, _NO_LIMIT),
    **dict.fromkeys(
        ("user_idle_s", "checkpoint_interval_s", "hang_timeout_s", "idle_timeout_s"), _SECONDS
    ),
    **dict.fromkeys(("data_min_rows", "data_min_count", "min_examples"), Largest(1e9, _NO_PART)),
    "min_batch": Largest(1e6, _NO_PART),
    **dict.fromkeys(("min_cohort", "secure_min"), Largest(1e5, _NO_PART)),
    "parts": Largest(1e6, "a data set is not shared by so many machines"),
    "data_seed": Largest(2**63 - 1, "a seed is a number of 63 bits"),
    "threads": Largest(4096, "no machine has so many cores; 0 uses half of them"),
    "trainer_tries": Largest(1000, "a trainer that failed this many times fails again"),
    **dict.fromkeys(
        ("jobs_private_per_day", "model_choices_per_day"),
        Largest(1e6, "that is more than one answer in 0.1 s"),
    ),
}
_LEAST = {
    "data_seed": (0, "a seed is not negative"),
    "hang_timeout_s": (
        1.0,
        "the trainer would be stopped again and again, as a batch takes longer",
    ),
    "privacy_delta": (_MIN_DELTA, "noise for so small a probability hides all of the answer"),
}


def objections(chosen: AgentSettings, names: Iterable[str]) -> list[str]:
    """A sentence for each of these settings whose value makes no sense."""
    found = []
    for name in names:
        value = getattr(chosen, name)
        if name in _LARGEST and value > (largest := _LARGEST[name]).value:
            bound = f"at most {largest.value:g}"
            found.append(f"{name} must be {bound}, not {value:g}: {largest.meaning}")
        if name in _LEAST and value < (least := _LEAST[name])[0]:
            found.append(f"{name} must be at least {least[0]:g}, not {value:g}: {least[1]}")
    return found
