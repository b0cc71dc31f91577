"""A ClientApp in a trainer's process: `python -m commonweight.flower_apps.client FOLDER`.

It uses the main loop of `agent.trainer`. The app is loaded with its first message and stays, so a
round takes no import. Its context is read from a file before each message and written to another
after it: the agent decides which of them counts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from commonweight.flower_apps import app_code, flower_names, offline, records

# After the names above, which switch telemetry off.
from flwr.app import Context, Message, RecordDict  # isort: skip

from agent.tasks.work import Done, RunApp
from agent.trainer import main_loop
from agent.trainer.__main__ import lower_priority
from agent.trainer.ipc import Failed
from agent.trainer.oom_kills import prefer_for_oom_kill
from protocols.errors import CommonweightError
from protocols.local import flower_apps

#: The suffix of the file beside a state that has its arrays.
ARRAYS = ".safetensors"


class AppExecutor:
    """Passes messages to the ClientApp in `folder`, if `code` is the digest of its code."""

    def __init__(self, folder: Path, code: str) -> None:
        self._folder, self._code = folder, code
        self._app: Any = None
        self._config: dict[str, Any] = {}

    def do(self, work: RunApp) -> Done | Failed:
        """Do the work. Raises CommonweightError, OSError, and what the app raises."""
        flower_names.become(work.flower_run)
        if self._app is None:
            card = app_code.read_approved(self._folder, self._code)
            self._config = card.config
            self._app = app_code.load(self._folder, card.client)
        context = Context(
            work.flower_run,
            work.node,
            dict(work.node_config),
            _read_state(work.state),
            flower_apps.fuse(self._config, work.settings),
        )
        base = Path(work.base) if work.base else None
        content = records.unpack(work.told, base)
        asked = Message(content, work.node, work.message_type, group_id=work.group)
        answer = self._app(asked, context)
        if not isinstance(answer, Message):
            raise TypeError(f"the ClientApp returned {type(answer).__name__}, not a Message")
        if answer.has_error():
            raise CommonweightError(answer.error.reason or "the app replied with an error")
        packed = records.pack(answer.content, Path(work.out))
        _write_state(work.state_out, context.state)
        return Done(id=work.id, digest=packed.digest, nbytes=packed.nbytes, description=packed.told)


def _read_state(file: str) -> RecordDict:
    """The saved context of the app; empty at first."""
    if not file:
        return RecordDict()
    arrays = Path(file + ARRAYS)
    return records.unpack(Path(file).read_bytes(), arrays if arrays.exists() else None)


def _write_state(file: str, state: RecordDict) -> None:
    """Write the context of the app; no file if it is empty."""
    if not len(state):
        return
    packed = records.pack(state, Path(file + ARRAYS))
    Path(file).write_bytes(packed.told)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m commonweight.flower_apps.client")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--code", required=True)
    parser.add_argument("--nice", type=int, default=0)
    options = parser.parse_args()
    offline.prepare()
    lower_priority(options.nice)
    prefer_for_oom_kill()
    main_loop.run(lambda control, send: AppExecutor(options.folder.absolute(), options.code))


if __name__ == "__main__":
    main()
