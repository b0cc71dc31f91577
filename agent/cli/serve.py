"""`commonweight-agent serve`: an HTTP server on this machine that predicts with a shared model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket as net
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli.common import print_line
from agent.cli.models import LATEST, find_model, load_predicting_task
from agent.home import settings
from protocols.errors import PortInUse, UsageError
from protocols.local import homes

if TYPE_CHECKING:
    import uvicorn

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
) -> None:
    """Serve predictions of the shared model over HTTP, until Ctrl-C."""
    if socket is not None and socket.exists():
        raise UsageError(f"{socket} exists already", "stop the service that uses it, or delete it")
    os.umask(0o077)
    try:
        with tempfile.TemporaryDirectory(prefix="commonweight-") as cache:
            asyncio.run(_serve(_load(model, Path(cache)), model, Path(cache), port, socket))
    finally:
        if socket is not None:
            socket.unlink(missing_ok=True)


def _load(model: str, cache: Path, old: ServedModel | None = None) -> ServedModel:
    """Load the model and its task. A task that `old` has loaded already is used again.

    `cache` is a folder that the task may use. Raises UnknownName, UsageError, NotEnrolled, and what
    the task's `load` raises.
    """
    from agent.inference.server import ServedModel

    chosen = settings.read(homes.home_path("agent"))
    found = find_model(model)
    if old is not None and old.name == found.task:
        task = old.task
    else:
        task = load_predicting_task(found.task, chosen, cache)
    weights = found.load_weights()
    return ServedModel(found.path.stem, found.task, task, weights, found.task_settings)


async def _serve(
    served: ServedModel, model: str, cache: Path, port: int, socket: Path | None
) -> None:
    import uvicorn

    from agent.inference.server import InferenceServer

    server = InferenceServer(served, lambda old: _load_newer(old, model, cache))
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


def _load_newer(old: ServedModel, model: str, cache: Path) -> ServedModel | None:
    """A newer version, if there is one and `model` is `latest`."""
    if model != LATEST:
        return None
    home = homes.open_home("agent")
    newest = max(
        (home / "cache").glob("*.safetensors"), key=lambda path: path.stat().st_mtime, default=None
    )
    if newest is None or newest.stem == old.version:
        return None
    found = _load(model, cache, old)
    return found if found.version != old.version else None
