"""Stock `flower-supernode` 1.41 at our door: refused cleanly, with and without a registered key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives import serialization

from agent.home import enrollment_file
from agent.home.credentials import Credentials
from agent.transport.coordinator_client import CoordinatorClient
from protocols.enrollment import identity
from protocols.local.atomic_files import write_private
from tests.hostile.tools import bounded_growth
from tests.support.fleet_harness import HOST, Fleet, environment, fleet, two_free_ports
from tests.support.waiting import wait_for

STOCK = Path(sys.executable).with_name("flower-supernode")
WITHIN_S = 30.0
#: What the stock program says of a refusal, on its way out or before it tries again.
SEEN = ("401 Unauthorized", "404 Not Found")

pytestmark = [
    pytest.mark.skipif(not STOCK.exists(), reason="flower-supernode is not installed"),
    pytest.mark.attack("20.strangers"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet(tmp_path_factory.mktemp("stock")) as made:
        made.up()
        made.join("ada")
        yield made


def openssh_key(path: Path, home: Path) -> None:
    """The enrolled machine's own P-384 key, in the form that the stock program reads."""
    key = identity.load_node_key(home / "node.key")
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    path.chmod(0o600)


def asked(site: Fleet) -> int:
    """How many requests on Flower's routes our server has refused so far, by its log."""
    return site.programs["up"].log.count("refused POST /v1/fleet/activate-node: ")


@pytest.mark.parametrize("who", ["nobody", "its own new key", "a registered key"])
def test_stock_supernode_is_refused_cleanly(site: Fleet, tmp_path: Path, who: str) -> None:
    """Attack: connect with the stock `flower-supernode`, with and without a registered key."""
    up = json.loads((site.home / "up.json").read_bytes())
    enrollment = enrollment_file.read_enrollment(site.folder / "ada")
    ca = tmp_path / "ca.pem"
    ca.write_text(enrollment.ca_pem)
    port, _ = two_free_ports()
    words = ["--superlink", up["address"], "--root-certificates", str(ca), "--max-retries", "2"]
    words += ["--max-wait-time", "3", "--host", HOST, "--port", str(port)]
    words += ["--isolation", "process"]  # it starts no process of its own
    if who == "a registered key":
        openssh_key(tmp_path / "node", site.folder / "ada")
        words += ["--auth-supernode-private-key", str(tmp_path / "node")]
    elif who == "its own new key":
        (tmp_path / "strange").mkdir()
        write_private(
            tmp_path / "strange" / "node.key", identity.private_pem(identity.new_node_key())
        )
        openssh_key(tmp_path / "node", tmp_path / "strange")
        words += ["--auth-supernode-private-key", str(tmp_path / "node")]
    before = asked(site)
    env = environment(tmp_path) | {
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    log = tmp_path / "stock.log"
    with log.open("wb") as output, bounded_growth(up["pid"], 64, f"stock supernode with {who}"):
        process = subprocess.Popen(
            [str(STOCK), *words],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            wait_for(lambda: process.poll() is not None or was_refused(log), "a refusal", WITHIN_S)
        finally:
            _end(process)
    said = log.read_text(errors="replace")
    print(f"{who}: {[line for line in said.splitlines() if 'error' in line]}")
    # With a key it stops at the first 401, without a word.
    assert was_refused(log) or asked(site) > before, said
    # Our server is well, nothing was registered or taken offline, and its own machine is served.
    assert "Traceback" not in site.programs["up"].log
    peers = site.data("peers", "list")
    assert [peer["name"] for peer in peers] == ["ada"]
    link = CoordinatorClient(Credentials.load(site.folder / "ada", enrollment))
    link.open()
    assert link.pull() is None
    link.close()


def was_refused(log: Path) -> bool:
    return any(word in log.read_text(errors="replace") for word in SEEN)


def _end(process: subprocess.Popen[bytes]) -> None:
    """It and what it has started, by their ids."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for one in family:
        one.terminate()
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(family, timeout=5)
    for one in left:
        one.kill()
    assert os.name == "nt" or process.returncode is not None
