"""Settings of tasks, so that a run with wrong ones is refused at once. Pure.

The coordinator runs no task. It knows the settings of the built-in tasks, and the types and bounds
that peers tell in the handshake of a run or of a check. Peers check all settings again.
"""

from __future__ import annotations

from coordinator.runs.state import Run
from coordinator.storage.run_events import RunSpec
from protocols.errors import UsageError
from protocols.model import built_in_settings, setting_specs
from protocols.model.setting_specs import SettingSpecs
from protocols.tables import preprocessing
from protocols.tables.model_scores import is_open


class ToldSettings:
    """The settings of tasks by name, as most peers told them in the newest run or check of each;
    those of a built-in task until then."""

    def __init__(self) -> None:
        self._by_task: dict[str, SettingSpecs] = {}

    def note(self, run: Run) -> None:
        """Store the settings that the peers of this run have sent."""
        if run.card is not None:
            self._by_task[run.spec.task] = run.card.settings

    def check(self, spec: RunSpec) -> None:
        """Raise UnknownName or UsageError for a setting that the task does not take.

        A check of the peers passes, as it asks them for the settings; so does a run for the fleet
        above.
        """
        # A card may be older than this version, and lack settings of a built-in task.
        known = {
            **built_in_settings.BY_TASK.get(spec.task, {}),
            **self._by_task.get(spec.task, {}),
        }
        if not known or spec.only:
            return
        settings = dict(spec.settings)
        if is_open(spec.task, settings):  # the coordinator's part: older agents need not know it
            del settings["model"]
        try:
            setting_specs.check(settings, known)
        except UsageError as err:
            more = f"if the task has changed: commonweight run check {spec.task} --settings"
            if spec.task in built_in_settings.BY_TASK:
                more = f"commonweight task show {spec.task}"
            raise type(err)(err.message, f"{err.hint}; {more}") from err


def check(spec: RunSpec) -> None:
    """Raise UsageError if the task cannot work with the settings of this run."""
    match spec.task:
        case "tabular":
            chosen = preprocessing.parse_settings(spec.settings)
            if text := spec.settings.get("preprocessing"):
                made = preprocessing.decode(str(text))
                preprocessing.check(made)
                if chosen.balanced and not made.target.weights:
                    raise UsageError(
                        "class_weights=balanced needs the weights of classes, and the file of the "
                        "preprocessing has none",
                        '"target": {…, "weights": [1, 20]}, in the order of its classes',
                    )
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
