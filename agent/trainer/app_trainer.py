"""The process of a Flower app's ClientApp: supervised, and in the sandbox, as the trainer is.

Unlike a trainer it reads nothing of the owner's data settings: what it may read is named when the
app is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from agent.home.settings_schema import AgentSettings
from agent.policy.file_access import SandboxRules
from agent.tasks.work import Done, RunApp
from agent.trainer.child_process import Program, half_of_cores
from agent.trainer.ipc import Progress
from agent.trainer.sandbox_rules import absolute
from agent.trainer.supervisor import TrainerSupervisor
from protocols.errors import TrainerFailed
from protocols.local import failpoints
from protocols.local.flower_apps import InstalledApp
from protocols.local.safe_paths import path_in

MODULE = "commonweight.flower_apps.client"


class AppTrainer(TrainerSupervisor):
    """Passes messages to apps, one at a time; another app ends the process of the last one.

    `folder` gets a folder for each app. `read`: further folders that apps may read.
    """

    def __init__(
        self,
        folder: Path,
        settings: Callable[[], AgentSettings],
        *,
        read: Collection[Path] = (),
        on_progress: Callable[[Progress], None],
    ) -> None:
        program, hang_s = Program(folder, (), 1), settings().hang_timeout_s
        super().__init__(program, on_progress=on_progress, hang_s=hang_s)
        self._folder, self._settings, self._read = folder, settings, read

    def folder_of(self, name: str) -> Path:
        """The folder in which an app works. It can write nowhere else."""
        return path_in(self._folder, name)

    def pass_on(self, name: str, app: InstalledApp, work: RunApp, within_s: float) -> Done:
        """Let the app `name` answer a message. Raises TrainerFailed, after `within_s` or the
        owner's hang_timeout_s as well."""
        chosen = self._settings()
        program = self._program_of(name, app, chosen)
        if program != self._program:
            self.stop()
            self._program = program
        self._hang_s = min(chosen.hang_timeout_s, within_s)
        try:
            return self.do(work)
        except TrainerFailed as err:
            if err.kind != "hung":
                raise
            text = f"the app did not answer within {self._hang_s:g} s and was killed"
            hint = "run start --deadline 1h, and commonweight-agent policy set hang_timeout_s 3600"
            raise TrainerFailed(err.kind, text, hint) from err

    def _program_of(self, name: str, app: InstalledApp, chosen: AgentSettings) -> Program:
        work_dir = self.folder_of(name)
        threads = chosen.threads or half_of_cores()
        rules = SandboxRules(
            mode=chosen.sandbox,
            read=(app.folder, *app.read, *(absolute(path) for path in self._read)),
            allowed=tuple(map(absolute, chosen.sandbox_read)),
            write=(
                absolute(work_dir),
                *app.write,
                *(absolute(path) for path in failpoints.folders()),
            ),
            compile=chosen.compile,
            tasks=False,  # no helper: apps know no table of the owner
        )
        arguments = (MODULE, app.folder, "--code", app.code, "--nice", str(chosen.nice))
        return Program(work_dir, arguments, threads, rules, app.python)
