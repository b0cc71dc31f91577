"""An agent that gets out through an HTTP proxy only, and a coordinator behind nginx by its name."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.fleet_harness import HOST, Fleet, fleet, two_free_ports
from tests.support.waiting import wait_for

_STREAM = next(
    (p for p in Path("/usr").glob("lib*/nginx/modules/ngx_stream_module.so")), Path("missing")
)


#: Bodies that nginx would write down before it passes them on.
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def _pump(one: socket.socket, other: socket.socket) -> None:
    try:
        while piece := one.recv(65536):
            other.sendall(piece)
    except OSError:
        pass
    finally:
        for end in (one, other):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


@contextmanager
def http_proxy() -> Iterator[tuple[str, list[str]]]:
    """A proxy that knows CONNECT; its URL, and what it was asked for."""
    asked: list[str] = []
    listener = socket.create_server((HOST, 0))

    def serve(client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(4096)
        where = head.split()[1].decode()
        asked.append(head.split()[0].decode() + " " + where)
        host, _, port = where.rpartition(":")
        upstream = socket.create_connection((host, int(port)))
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        threading.Thread(target=_pump, args=(upstream, client), daemon=True).start()
        _pump(client, upstream)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://{HOST}:{listener.getsockname()[1]}", asked
    finally:
        listener.close()


@pytest.mark.long
def test_an_agent_gets_out_through_a_proxy(tmp_path: Path) -> None:
    with http_proxy() as (url, asked), fleet(tmp_path) as site:
        site.up()
        site._settings |= {"HTTPS_PROXY": url, "NO_PROXY": ""}
        site.join("ada")
        for_joining = len(asked)
        site.start("ada")
        del site._settings["HTTPS_PROXY"]
        assert site.ended_run(site.start_run("ping", "--rounds", "2"))["state"] == "finished"
        assert 0 < for_joining < len(asked), "joining and working alike"
        assert all(line.startswith(f"CONNECT {HOST}:") for line in asked)


@contextmanager
def nginx(site: Fleet, name: str, port: int, changed: dict[str, str]) -> Iterator[None]:
    """nginx as deploy/`name` has it, on another port and with other words."""
    text = (Path(__file__).parents[2] / "deploy" / name).read_text()
    for old, new in {
        "train.example.org": "localhost",
        "listen 443": f"listen {HOST}:{port}",
        "events {}": f"daemon off; pid {site.folder}/nginx.pid; events {{}}",
        **changed,
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    config = site.folder / "nginx.conf"
    config.write_text(text)
    words = ["nginx", "-e", str(site.folder / "nginx.log"), "-c", str(config)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: _listens(port) or process.poll() is not None, "nginx listens")
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        yield
    finally:
        process.terminate()
        process.wait(10)


def _listens(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), 1).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(
    shutil.which("nginx") is None or not _STREAM.exists(),
    reason="needs nginx and its stream module (libnginx-mod-stream)",
)
def test_a_coordinator_behind_nginx_has_a_name_of_its_own(tmp_path: Path) -> None:
    """`localhost` is the name in the handshake; by another name nginx leads to somebody else."""
    front, back = two_free_ports()
    with fleet(tmp_path, COMMONWEIGHT_PUBLIC_ADDRESSES=f'["localhost:{front}"]') as site:
        site.up(port=back)
        words = {
            "modules/ngx_stream_module.so": str(_STREAM),
            "127.0.0.1:9092": f"{HOST}:{back}",
        }
        with nginx(site, "nginx.conf", front, words):
            site.join("ada")
            site.start("ada")
            assert site.agent("ada")["coordinator"] == f"localhost:{front}"
            assert site.ended_run(site.start_run("ping", "--rounds", "2"))["state"] == "finished"


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_a_coordinator_behind_nginx_has_a_path_of_its_own(tmp_path: Path) -> None:
    front, back = two_free_ports()
    public = f"localhost:{front}/fleet"
    with fleet(tmp_path, COMMONWEIGHT_PUBLIC_ADDRESSES=f'["{public}"]') as site:
        site.up(port=back)
        words = {
            "/var/lib/commonweight": str(site.home),
            "127.0.0.1:9092": f"{HOST}:{back}",
            "http {": f"http {{ access_log {site.folder}/access.log; "
            + " ".join(f"{kind}_temp_path {site.folder}/temp;" for kind in _TEMPORARY),
        }
        with nginx(site, "nginx-path.conf", front, words):
            site.join("ada")
            site.start("ada")
            assert site.agent("ada")["coordinator"] == public
            run = site.start_run("ping", "--rounds", "2", "--set", "kilobytes=3000")
            assert site.ended_run(run)["state"] == "finished"
            assert site.ask_agent("ada", "doctor").returncode == 0
        asked = (site.folder / "access.log").read_text()
        assert "PUT /fleet/cw/v1/updates/" in asked
        assert " /cw/" not in asked
