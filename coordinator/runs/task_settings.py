"""Settings that a built-in task needs, so that a run without them is refused at once. Pure.

The coordinator runs no task: other settings are checked by the peers in the handshake.
"""

from __future__ import annotations

from coordinator.storage.run_events import RunSpec
from protocols.errors import UsageError
from protocols.tables import preprocessing


def check(spec: RunSpec) -> None:
    """Raise UsageError if the task cannot work with the settings of this run."""
    match spec.task:
        case "tabular":
            chosen = preprocessing.parse_settings(spec.settings)
            if text := spec.settings.get("preprocessing"):
                made = preprocessing.decode(str(text))
                preprocessing.check(made)
                if made.target.name != chosen.target:
                    raise UsageError(
                        f"the preprocessing is for the target {made.target.name}, and the run for "
                        f"{chosen.target}",
                        "leave --target out",
                    )
        case "mnist" | "images" | "motion" | "ping" | "text-lm" | "lora" if spec.settings.get(
            "target"
        ):
            raise UsageError(
                f"the task {spec.task} predicts no column of a table",
                "leave --target out; for a goal: --until accuracy=0.9",
            )
        case "lora" if not spec.settings.get("model"):
            raise UsageError(
                "the task lora needs the name of its base model, a folder on each machine",
                "--set model=NAME, such as --set model=gpt2-small",
            )
