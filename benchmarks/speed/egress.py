"""How often the coordinator sends a version, and how long until all peers have it.

    python -m benchmarks.speed.egress [--mb 40] [--mbit 50] [--peers 2 4 8 16] [--out FOLDER]
    python -m benchmarks.speed.egress --slow

Each peer is a process with the agent's code for downloading and serving. A proxy limits the
coordinator's bandwidth over all connections; peers reach each other at loopback speed. It also
measures `share off`: each peer downloads from the coordinator.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from agent.home.credentials import Credentials
from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.p2p.sharing import Sharing
from agent.transport.version_store import VersionStore
from benchmarks.speed import report
from protocols.enrollment import identity
from protocols.local.atomic_files import write_private
from protocols.model import weights
from protocols.model.weights import Weights
from tests.support.fault_proxy import Fault, Proxy
from tests.support.https_site import HOST, Site

_SLOW_MB, _SLOW_MBIT = 8, 8.0
_OUT = Path(__file__).resolve().parents[2] / "docs" / "bench"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.egress", description=__doc__)
    parser.add_argument("--mb", type=int, default=40, help="size of the version")
    parser.add_argument("--mbit", type=float, default=50.0, help="the coordinator's line")
    parser.add_argument("--peers", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument(
        "--slow", action="store_true", help="only 8 peers behind a line of 1 MB/s; kept beside"
    )
    parser.add_argument("--out", type=Path, default=_OUT, help="where the results go")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peer:
        _be_a_peer(asked.peer)
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / "egress-results.json"
    kept = json.loads(file.read_text()) if file.exists() else {"rows": []}
    about = report.machine()
    if asked.slow:
        kept["slow"] = {"load_before": about["load_before"], **_row(8, _SLOW_MB, _SLOW_MBIT)}
    kept["machine"] = about
    rows = {row["peers"]: row for row in kept["rows"]}
    for peers in () if asked.slow else asked.peers:
        load = report.machine()["load_before"]
        rows[peers] = {"load_before": load, **_row(peers, asked.mb, asked.mbit)}
        kept["rows"] = [rows[number] for number in sorted(rows)]
        file.write_text(json.dumps(kept, indent=1) + "\n")
    file.write_text(json.dumps(kept, indent=1) + "\n")
    title = f"{asked.mb} MB, line of {asked.mbit:g} Mbit/s"
    _plot(asked.out / "egress.svg", title, kept["rows"])


def _row(peers: int, mb: int, mbit: float) -> dict[str, Any]:
    alone = _measured(peers, mb, mbit, "off")
    shared = _measured(peers, mb, mbit, "on")
    ratio = shared["seconds"] / alone["seconds"]
    print(
        f"{peers:3d} peers, {mb} MB at {mbit:g} Mbit/s: alone {alone['seconds']:6.1f} s, "
        f"{alone['egress']:5.2f} × the model; shared {shared['seconds']:6.1f} s, "
        f"{shared['egress']:5.2f} ×; {ratio:.2f} of the time",
        flush=True,
    )
    return {
        "peers": peers,
        "model_bytes": shared["nbytes"],
        "line_mbit_s": mbit,
        "alone_s": round(alone["seconds"], 2),
        "alone_egress": round(alone["egress"], 3),
        "shared_s": round(shared["seconds"], 2),
        "shared_egress": round(shared["egress"], 3),
        "time_ratio": round(ratio, 3),
    }


def _plot(file: Path, title: str, rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "commonweight"}):
        figure, axes = pyplot.subplots(figsize=(5.6, 3.4), layout="constrained")
        peers = [row["peers"] for row in rows]
        for name, words in (("alone", "from the coordinator only"), ("shared", "peers help")):
            axes.plot(peers, [row[f"{name}_s"] for row in rows], marker="o", label=words)
        axes.set(xlabel="peers", ylabel="seconds until all have it", title=title)
        axes.set(xscale="log", yscale="log", xticks=peers)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        axes.legend(frameon=False)
        figure.savefig(file, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _measured(peers: int, mb: int, mbit: float, policy: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="cw-egress-") as text:
        folder = Path(text)
        (folder / "coordinator").mkdir()
        model = Weights({"w": np.random.default_rng(1).standard_normal(mb * 250_000, np.float32)})
        with Site(folder / "coordinator").up() as site:
            digest = site.lane.save(model)
            nbytes = site.lane.version_path(digest).stat().st_size
            with Proxy(int(site.address.rpartition(":")[2])) as line:
                line.fault = Fault(line_bytes_per_s=mbit * 125_000)
                homes = [_home(site, folder, number, line.port, policy) for number in range(peers)]
                running = [_start(home) for home in homes]
                try:
                    for process in running:
                        _expect(process, "ready")
                    before, began = line.bytes_down, time.monotonic()
                    for process in running:
                        _tell(process, f"{digest} {nbytes}")
                    for process in running:
                        _expect(process, "have it")
                    seconds = time.monotonic() - began
                    egress = (line.bytes_down - before) / nbytes
                finally:
                    for process in running:
                        process.stdin.close()  # type: ignore[union-attr]
                    for process in running:
                        process.wait(120)
    return {"seconds": seconds, "egress": egress, "nbytes": nbytes}


def _home(site: Site, folder: Path, number: int, port: int, policy: str) -> Path:
    home = folder / f"peer{number}"
    home.mkdir()
    machine = site.enroll(home.name)
    write_private(home / "node.key", identity.private_pem(machine.node_key))
    write_private(home / "sign.key", identity.private_pem(machine.sign_key))
    (home / "ca.pem").write_bytes(site.ca_pem)
    told = {
        "address": f"{HOST}:{port}",
        "peer": machine.peer,
        "policy": policy,
        "coordinator": identity.public_bytes(site.sign_key).hex(),
    }
    (home / "told.json").write_text(json.dumps(told))
    return home


def _start(home: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.speed.egress", "--peer", str(home)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _expect(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    said = process.stdout.readline().strip()
    if said != line:
        raise RuntimeError(f"a peer said {said!r}, not {line!r}")


def _be_a_peer(home: Path) -> None:
    """Download the version named on standard input, and serve it until standard input ends."""
    logging.basicConfig(level=logging.WARNING, format=f"{home.name}: %(message)s")
    told = json.loads((home / "told.json").read_text())
    credentials = Credentials(
        told["address"],
        (home / "ca.pem").read_bytes(),
        told["peer"],
        identity.load_node_key(home / "node.key"),
        identity.load_signing_key(home / "sign.key"),
    )
    sharing = Sharing(told["policy"], home, credentials, bytes.fromhex(told["coordinator"]))
    loop = asyncio.new_event_loop()
    threading.Thread(target=lambda: loop.run_until_complete(sharing.run()), daemon=True).start()
    while told["policy"] != "off" and not sharing.plan_request().address:
        time.sleep(0.02)
    link = CoordinatorClient(credentials)
    (home / "cache").mkdir()
    versions = VersionStore(home / "cache", lambda: link, sharing)
    print("ready", flush=True)
    digest, nbytes = sys.stdin.readline().split()
    path = versions.fetch(digest, int(nbytes))
    print("have it" if weights.file_digest(path) == digest else "have wrong bytes", flush=True)
    sys.stdin.read()
    link.close()


if __name__ == "__main__":
    main()
