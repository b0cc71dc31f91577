"""`commonweight-agent serve`: answers in real time from the shared model, for this machine."""

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

from agent.cli.control import say
from protocols.errors import PortInUse, UsageError
from protocols.local import homes

if TYPE_CHECKING:
    import uvicorn

    from agent.inference.server import ServedModel

HOST = "127.0.0.1"


def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 takes any.")] = 9100,
    socket: Annotated[
        Path | None, typer.Option(help="A Unix socket in place of a port, for this user only.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="latest, which follows the runs; a digest; or an exported file.")
    ] = "latest",
) -> None:
    """Answer over HTTP from the agent's copy of the shared model, until Ctrl-C."""
    if socket is not None and socket.exists():
        raise UsageError(f"{socket} exists already", "another service, or what a dead one left")
    os.umask(0o077)
    try:
        with tempfile.TemporaryDirectory(prefix="commonweight-") as cache:
            asyncio.run(_serve(_load(model, Path(cache)), model, Path(cache), port, socket))
    finally:
        if socket is not None:
            socket.unlink(missing_ok=True)


def _load(model: str, cache: Path, old: ServedModel | None = None) -> ServedModel:
    """The model and its task, which is `old`'s if it is the same: its data are loaded already.

    `cache` is a folder in which the task may keep what it made of the data. Raises UnknownName,
    UsageError, NotEnrolled, and what the task's `load` raises.
    """
    from agent.cli.export import find_model, load_predicting_task, load_weights
    from agent.home import settings
    from agent.inference.server import ServedModel
    from protocols.model import personalization

    chosen = settings.read(homes.home_path("agent"))
    path, name, asked = find_model(model)
    if old is not None and old.name == name:
        task = old.task
    else:
        task = load_predicting_task(name, chosen, cache)
    plain = {key: value for key, value in asked.items() if key not in personalization.SETTINGS}
    return ServedModel(path.stem, name, task, load_weights(path), plain)


async def _serve(
    served: ServedModel, model: str, cache: Path, port: int, socket: Path | None
) -> None:
    import uvicorn

    from agent.inference.server import InferenceServer

    server = InferenceServer(served, lambda old: _load_newer(old, model, cache))
    http = uvicorn.Server(
        uvicorn.Config(server.app(), lifespan="off", log_config=None, access_log=False)
    )
    # uvicorn would end the process by the signal itself, and leave the socket's file.
    http.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    for name in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows: KeyboardInterrupt instead
            asyncio.get_running_loop().add_signal_handler(name, _request_exit, http)
    listener = _open_listener(port, socket)
    where = f"the socket {socket}" if socket else f"http://{HOST}:{listener.getsockname()[1]}"
    say(f"{served.name} {served.version[:12]} answers at {where}, /predict; Ctrl-C stops it")
    works = [asyncio.create_task(work) for work in (server.work(), server.watch())]
    serving = asyncio.create_task(http.serve([listener]))
    done, _ = await asyncio.wait({serving, *works}, return_when=asyncio.FIRST_COMPLETED)
    http.should_exit = True
    for work in works:
        work.cancel()
    await serving
    for task in done - {serving}:
        task.result()


def _request_exit(http: uvicorn.Server) -> None:
    http.should_exit = True


def _open_listener(port: int, path: Path | None) -> net.socket:
    """A bound socket. uvicorn's own would let everybody in by a Unix socket (0666)."""
    try:
        if path is not None:
            listener = net.socket(net.AF_UNIX)
            listener.bind(str(path))  # 0600 by the umask
            listener.listen()
            return listener
        listener = net.socket(net.AF_INET)
        listener.setsockopt(net.SOL_SOCKET, net.SO_REUSEADDR, 1)
        # asyncio sets it only on sockets that name their protocol: 40 ms an answer without.
        listener.setsockopt(net.IPPROTO_TCP, net.TCP_NODELAY, 1)
        listener.bind((HOST, port))
        listener.listen()  # who reads that it answers may ask at once
    except OSError as err:
        what = f"the socket {path}" if path else f"port {port}"
        raise PortInUse(f"{what} cannot be opened: {err.strerror}", "choose another") from err
    return listener


def _load_newer(old: ServedModel, model: str, cache: Path) -> ServedModel | None:
    """A version that has come since, if the newest is followed."""
    if model != "latest":
        return None
    home = homes.open_home("agent")
    newest = max(
        (home / "cache").glob("*.safetensors"), key=lambda path: path.stat().st_mtime, default=None
    )
    if newest is None or newest.stem == old.version:
        return None
    found = _load(model, cache, old)
    return found if found.version != old.version else None
