"""A ServerApp over a Grid of pipes: `python -m commonweight.flower_apps.server FOLDER`.

The coordinator starts it in the folder of a run. It first limits itself, as tasks are limited on
agents: it reads its app, the packages of its Python and what the operator has named, writes only
the folder of the run, and has no network. So an app cannot read the coordinator's keys.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from agent.policy import sandbox
from agent.policy.file_access import SandboxRules
from commonweight.flower_apps import offline

#: Set in the process that is in the sandbox already.
_LIMITED = "COMMONWEIGHT_SERVER_APP_LIMITED"
_POLL_S = 1.0
#: Flower's code for an exception in a ClientApp.
_FAILED = 2


def _enter_sandbox(folder: Path, code: str, read: list[str], write: list[str]) -> None:
    """Begin again in the sandbox: with the same pipes, as `agent.trainer.sandboxed` does it."""
    here = Path.cwd()
    for name in (sandbox.TEMPORARY, "caches"):
        (here / name).mkdir(mode=0o700, exist_ok=True)
    rules = SandboxRules(read=(str(folder), *read), write=(str(here), *write), tasks=False)
    os.environ |= {**sandbox.environment(rules, here), _LIMITED: "1"}
    module = "commonweight.flower_apps.server"
    words = ["-P", "-m", "agent.trainer.sandboxed", module, str(folder), f"--code={code}"]
    os.execv(sys.executable, [sys.executable, *words])


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Private copies of the two pipes: what the app prints goes to the log."""
    answers, questions = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return os.fdopen(answers, "rb"), os.fdopen(questions, "wb")


def _end_with(parent: int) -> None:
    """End this process once the coordinator has ended, also while the app works."""
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)


def run(folder: Path, code: str) -> int:
    """Run the ServerApp until it ends, if its code has this digest; the exit status."""
    answers, questions = _take_pipes()
    threading.Thread(target=_end_with, args=(os.getppid(),), name="parent", daemon=True).start()
    from commonweight.flower_apps import app_code, flower_names, records

    # After the names above, which switch telemetry off.
    from flwr.app import Context, Error, Message, RecordDict  # isort: skip
    from flwr.serverapp import Grid  # isort: skip

    from coordinator.runs.apps import frames
    from coordinator.runs.apps.frames import Content, End, Outgoing
    from protocols.local import flower_apps

    def read_frame() -> Any:
        head = answers.read(frames.LENGTH_BYTES)
        if len(head) < frames.LENGTH_BYTES:  # the coordinator has gone
            os._exit(1)
        return frames.decode_answered(answers.read(frames.length_of(head)))

    def write_frame(frame: Any) -> None:
        questions.write(frames.encode(frame))
        questions.flush()

    hello = read_frame()
    assert isinstance(hello, frames.Hello)
    flower_names.become(hello.flower_run)
    out, inbox = Path(frames.OUT).absolute(), Path(frames.IN).absolute()

    class PipeGrid(Grid):
        """A Grid whose nodes and messages are the coordinator's. Legacy apps use many threads."""

        def __init__(self) -> None:
            self._lock = threading.Lock()
            self._asked: dict[int, Message] = {}

        def _ask(self, frame: Any) -> Any:
            with self._lock:
                write_frame(frame)
                return read_frame()

        def set_run(self, run: Any) -> None:
            raise NotImplementedError("the run is that of the coordinator")

        @property
        def run(self) -> Any:
            return SimpleNamespace(run_id=hello.flower_run)

        def create_message(
            self,
            content: RecordDict,
            message_type: str,
            dst_node_id: int,
            group_id: str,
            ttl: float | None = None,
        ) -> Message:
            return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

        def get_node_ids(self) -> Iterable[int]:
            found = self._ask(frames.NodesAsked())
            return list(found.nodes)

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            outgoing, numbers = list(messages), dict[int, int]()
            contents: list[Content] = []
            sent: list[Outgoing] = []
            for message in outgoing:
                if id(message.content) not in numbers:
                    numbers[id(message.content)] = len(contents)
                    contents.append(self._pack(message.content))
                meta = message.metadata
                sent.append(
                    Outgoing(
                        content=numbers[id(message.content)],
                        node=meta.dst_node_id,
                        message_type=meta.message_type,
                        group=meta.group_id,
                    )
                )
            pushed = self._ask(frames.Push(contents=tuple(contents), messages=tuple(sent)))
            for number, message in zip(pushed.ids, outgoing, strict=True):
                if number:
                    flower_names.name_message(message, str(number))
                    self._asked[number] = message
            return [str(number) for number in pushed.ids if number]

        def _pack(self, content: RecordDict) -> Content:
            file = out / uuid.uuid4().hex
            packed = records.pack(content, file)
            if packed.digest:
                file.rename(out / f"{packed.digest}{frames.SUFFIX}")
            return Content(told=packed.told, digest=packed.digest)

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return self._pull(message_ids, 0.0)

        def _pull(
            self, message_ids: Iterable[str], wait_s: float, forgotten: Iterable[str] = ()
        ) -> list[Message]:
            numbers = tuple(int(one) for one in message_ids if int(one) in self._asked)
            gone = tuple(map(int, forgotten))
            found = self._ask(frames.Pull(ids=numbers, wait_s=wait_s, forgotten=gone))
            return [self._reply(one) for one in found.replies]

        def _reply(self, found: Any) -> Message:
            asked = self._asked.pop(found.id)
            file = inbox / f"{found.id}{frames.SUFFIX}" if found.has_arrays else None
            try:
                if found.error:
                    return flower_names.reply(asked, Error(_FAILED, found.error))
                return flower_names.reply(asked, records.unpack(found.told, file))
            except Exception as err:  # one peer's answer must not end the app
                traceback.print_exc()
                return flower_names.reply(asked, Error(_FAILED, f"it cannot be read: {err}"))
            finally:
                if file is not None:
                    file.unlink(missing_ok=True)

        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            pending = set(self.push_messages(messages))
            end = None if timeout is None else time.monotonic() + timeout
            replies: list[Message] = []
            while pending and (end is None or time.monotonic() < end):
                left = _POLL_S if end is None else max(0.0, min(_POLL_S, end - time.monotonic()))
                found = self._pull(pending, left)
                replies += found
                pending -= {reply.metadata.reply_to_message_id for reply in found}
            if pending:  # their replies would stay on the disk
                self._pull((), 0.0, forgotten=pending)
                for one in pending:
                    self._asked.pop(int(one), None)
            return replies

    error = ""
    try:
        card = app_code.read_approved(folder, code)
        config = flower_apps.fuse(card.config, hello.config)
        context = Context(hello.flower_run, flower_names.SERVER_NODE, {}, RecordDict(), config)
        app_code.load(folder, card.server)(PipeGrid(), context)
    except SystemExit as err:
        error = "" if err.code in (None, 0) else f"the ServerApp exited with {err.code}"
    except BaseException as err:
        traceback.print_exc()
        error = sandbox.refusal(err) or f"{type(err).__name__}: {err}"
    shown = "".join(c if c.isprintable() else "·" for c in error[:400])
    write_frame(End(error=shown))
    return 1 if error else 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m commonweight.flower_apps.server")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--code", required=True)
    parser.add_argument("--read", action="append", default=[])
    parser.add_argument("--write", action="append", default=[])
    parser.add_argument("--no-sandbox", action="store_true")
    options = parser.parse_args()
    is_limited = os.environ.pop(_LIMITED, "") or options.no_sandbox
    if not is_limited and sys.platform == "linux":
        _enter_sandbox(options.folder, options.code, options.read, options.write)
    if not options.no_sandbox:
        offline.prepare()
    status = run(options.folder, options.code)
    sys.stdout.flush()
    os._exit(status)  # threads of the app must not keep the process


if __name__ == "__main__":
    main()
