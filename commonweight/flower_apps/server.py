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
from pathlib import Path

from agent.policy import sandbox
from agent.policy.file_access import SandboxRules
from commonweight.flower_apps import offline
from protocols.local import programs

#: Set in the process that is in the sandbox already.
_LIMITED = "COMMONWEIGHT_SERVER_APP_LIMITED"
_POLL_S = 1.0


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


def _end_with(parent: int) -> None:
    """End this process once the coordinator has ended, also while the app works."""
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)


def run(folder: Path, code: str) -> int:
    """Run the ServerApp until it ends, if its code has this digest; the exit status."""
    answers, questions = programs.take_pipes()
    threading.Thread(target=_end_with, args=(os.getppid(),), name="parent", daemon=True).start()
    # Imported only in the sandbox: Flower reads files and the environment.
    from commonweight.flower_apps import app_code, flower_names
    from commonweight.flower_apps.pipe_grid import PipeGrid, Pipes

    from flwr.app import Context, RecordDict  # isort: skip

    from coordinator.runs.apps import frames
    from protocols.local import flower_apps

    pipes = Pipes(answers, questions)
    hello = pipes.read()
    assert isinstance(hello, frames.Hello)
    flower_names.become(hello.flower_run)
    outgoing, incoming = Path(frames.OUT).absolute(), Path(frames.IN).absolute()
    error = ""
    try:
        card = app_code.read_approved(folder, code)
        config = flower_apps.fuse(card.config, hello.config)
        context = Context(hello.flower_run, flower_names.SERVER_NODE, {}, RecordDict(), config)
        grid = PipeGrid(pipes, hello.flower_run, outgoing, incoming)
        app_code.load(folder, card.server)(grid, context)
    except SystemExit as err:
        error = "" if err.code in (None, 0) else f"the ServerApp exited with {err.code}"
    except BaseException as err:
        traceback.print_exc()
        error = sandbox.refusal(err) or f"{type(err).__name__}: {err}"
    shown = "".join(c if c.isprintable() else "·" for c in error[:400])
    pipes.write(frames.End(error=shown))
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
