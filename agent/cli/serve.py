"""`commonweight-agent models serve`: an HTTP server that predicts with a shared model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket as net
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli.common import print_line
from agent.cli.models import LATEST, TaskFile, Use, UseOption, find_model, with_task
from agent.home import own_results, settings
from protocols.errors import CommonweightError, PortInUse, UsageError
from protocols.local import homes
from protocols.model.weights import file_digest

if TYPE_CHECKING:
    import uvicorn

    from agent.cli.local_trainer import LocalTrainer
    from agent.inference.server import ServedModel

HOST = "127.0.0.1"


def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 is any.")] = 9100,
    socket: Annotated[
        Path | None, typer.Option(help="A Unix socket instead of a port, for this user only.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="latest, which follows the runs; a digest; or an exported file.")
    ] = LATEST,
    use: UseOption = Use.RECOMMENDED,
    task: TaskFile = "",
) -> None:
    """Serve predictions over HTTP, until Ctrl-C."""
    if socket is not None and socket.exists():
        raise UsageError(f"{socket} exists already", "stop the service that uses it, or delete it")
    os.umask(0o077)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="commonweight-") as cache,
            contextlib.ExitStack() as stack,
        ):
            loader = _Loader(model, use, task, Path(cache), stack)
            asyncio.run(_serve(loader, port, socket))
    finally:
        if socket is not None:
            socket.unlink(missing_ok=True)


class _Loader:
    """Loads the model, and newer ones. Its task runs in the sandbox, where no socket is."""

    def __init__(
        self, model: str, use: Use, task: str, folder: Path, stack: contextlib.ExitStack
    ) -> None:
        self._model, self._use, self._task = model, use, task
        self._folder, self._stack = folder, stack
        #: The newest file that was looked at.
        self._seen: Path | None = None
        #: The trainer of the model, and the name of its task.
        self._trainer: LocalTrainer | None = None
        self._name = ""
        self.rows = folder / "rows"
        self.rows.mkdir()

    def load(self) -> ServedModel:
        """Load the model and its task. A trainer that has loaded the task already is used again.

        Raises UnknownName, UsageError, NotEnrolled, and what the task raises.
        """
        from agent.cli.local_trainer import LocalTrainer
        from agent.inference.server import ServedModel

        self._seen = self._newest()
        shared = find_model(self._model)
        found = shared.recommended(self._use) if self._model == LATEST else shared
        found.check_whole()
        if self._trainer is None or self._name != found.task:
            home = homes.home_path("agent")
            folder = Path(tempfile.mkdtemp(dir=self._folder))
            read = [found.path, home / "cache", home / own_results.FOLDER, self.rows]
            chosen = with_task(settings.read(home), found, self._task)
            trainer = self._stack.enter_context(LocalTrainer(chosen, folder, read))
            self._trainer, self._name = trainer, found.task
        self._trainer.load(found)
        version = found.digest or found.path.stem
        if found.path != shared.path:
            version = file_digest(found.path)
            print_line(f"that is {found.origin}")
        return ServedModel(version, found.task, partial(self._trainer.predict, found))

    def load_newer(self, old: ServedModel) -> ServedModel | None:
        """A newer version, if there is one and the model is `latest`."""
        if self._model != LATEST:
            return None
        if self._newest() in (None, self._seen):
            return None
        try:
            found = self.load()
        except CommonweightError as err:  # such as a file that is damaged on this disk
            print_line(f"the newest version is not loaded: {err.message}; {err.hint}")
            return None
        return found if found.version != old.version else None

    def _newest(self) -> Path | None:
        """The newest version here, or the result of a run that has ended, if that is newer."""
        home = homes.open_home("agent")
        found = [*(home / "cache").glob("*.safetensors"), *own_results.result_files(home)]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)


async def _serve(loader: _Loader, port: int, socket: Path | None) -> None:
    import uvicorn

    from agent.inference.server import InferenceServer

    served = loader.load()
    server = InferenceServer(served, loader.load_newer, loader.rows)
    http = uvicorn.Server(
        uvicorn.Config(server.app(), lifespan="off", log_config=None, access_log=False)
    )
    # uvicorn's handlers would end the process and leave the socket's file.
    http.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    for name in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows: KeyboardInterrupt instead
            asyncio.get_running_loop().add_signal_handler(name, _request_exit, http)
    listener = _open_listener(port, socket)
    where = f"the socket {socket}" if socket else f"http://{HOST}:{listener.getsockname()[1]}"
    print_line(f"{served.name} {served.version[:12]} answers at {where}, /predict; Ctrl-C stops it")
    loops = [asyncio.create_task(loop) for loop in (server.work(), server.watch())]
    serving = asyncio.create_task(http.serve([listener]))
    done, _ = await asyncio.wait({serving, *loops}, return_when=asyncio.FIRST_COMPLETED)
    http.should_exit = True
    for loop in loops:
        loop.cancel()
    await serving
    for task in done - {serving}:
        task.result()


def _request_exit(http: uvicorn.Server) -> None:
    http.should_exit = True


def _open_listener(port: int, path: Path | None) -> net.socket:
    """Open a socket. uvicorn would create a Unix socket that every user may open (0666)."""
    try:
        if path is not None:
            listener = net.socket(net.AF_UNIX)
            listener.bind(str(path))  # 0600 by the umask
            listener.listen()
            return listener
        listener = net.socket(net.AF_INET)
        listener.setsockopt(net.SOL_SOCKET, net.SO_REUSEADDR, 1)
        # asyncio sets this only on sockets that name their protocol; without it, +40 ms an answer.
        listener.setsockopt(net.IPPROTO_TCP, net.TCP_NODELAY, 1)
        listener.bind((HOST, port))
        listener.listen()  # before the address is printed, so that clients can connect at once
    except OSError as err:
        what = f"the socket {path}" if path else f"port {port}"
        raise PortInUse(f"{what} cannot be opened: {err.strerror}", "choose another") from err
    return listener
