"""Two networks and a router: real programs in network namespaces, where one agent has a quick line.

      hub 10.77.1.2 ── router ── 10.77.2.0/24: quick .2, slow .3, slow .4

The coordinator's line lets 200 Mbit/s through to one agent and 4 Mbit/s to all others together;
among each other the agents are quick.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.fleet_harness import AGENT, ALLOW, COORDINATOR, command, environment
from tests.support.waiting import wait_for

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        shutil.which("ip") is None or shutil.which("tc") is None or os.geteuid() != 0,
        reason="network namespaces need root and iproute2",
    ),
]

HUB, AGENTS = "10.77.1.2", {"quick": "10.77.2.2", "slow1": "10.77.2.3", "slow2": "10.77.2.4"}
MODEL_KB = 2 * 1024


def do(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@contextmanager
def networks() -> Iterator[dict[str, str]]:
    """The namespaces by name. Skips where the kernel has not what they need."""
    prefix = f"cw{os.getpid() % 100000}"
    spaces = {name: f"{prefix}-{name}" for name in ("hub", "router", *AGENTS)}
    made: list[str] = []
    try:
        for space in spaces.values():
            do("ip", "netns", "add", space)
            made.append(space)
            do("ip", "-n", space, "link", "set", "lo", "up")
        router = spaces["router"]
        do("ip", "-n", router, "link", "add", "lan", "type", "bridge")
        do("ip", "-n", router, "addr", "add", "10.77.2.1/24", "dev", "lan")
        do("ip", "-n", router, "link", "set", "lan", "up")
        do("ip", "netns", "exec", router, "sysctl", "-q", "net.ipv4.ip_forward=1")
        for name in ("hub", *AGENTS):
            outside = f"to-{name}"
            do("ip", "-n", router, "link", "add", outside, "type", "veth",
               "peer", "name", "eth0", "netns", spaces[name])  # fmt: skip
            do("ip", "-n", router, "link", "set", outside, "up")
            do("ip", "-n", spaces[name], "link", "set", "eth0", "up")
            address, gateway = (AGENTS[name], "10.77.2.1") if name in AGENTS else (HUB, "10.77.1.1")
            do("ip", "-n", spaces[name], "addr", "add", f"{address}/24", "dev", "eth0")
            do("ip", "-n", spaces[name], "route", "add", "default", "via", gateway)
            if name in AGENTS:
                do("ip", "-n", router, "link", "set", outside, "master", "lan")
        do("ip", "-n", router, "addr", "add", "10.77.1.1/24", "dev", "to-hub")
        _slow_line(spaces["hub"])
    except subprocess.CalledProcessError as err:
        _remove(made)
        pytest.skip(f"this kernel cannot: {err.stderr.decode(errors='replace')[:100]}")
    try:
        yield spaces
    finally:
        _remove(made)


def _slow_line(hub: str) -> None:
    tc = ("tc", "-n", hub)
    do(*tc, "qdisc", "add", "dev", "eth0", "root", "handle", "1:", "htb", "default", "20")
    do(*tc, "class", "add", "dev", "eth0", "parent", "1:", "classid", "1:10", "htb",
       "rate", "200mbit")  # fmt: skip
    do(*tc, "class", "add", "dev", "eth0", "parent", "1:", "classid", "1:20", "htb",
       "rate", "4mbit")  # fmt: skip
    do(*tc, "filter", "add", "dev", "eth0", "protocol", "ip", "parent", "1:", "u32",
       "match", "ip", "dst", f"{AGENTS['quick']}/32", "flowid", "1:10")  # fmt: skip


def _remove(spaces: list[str]) -> None:
    for space in spaces:
        subprocess.run(("ip", "netns", "del", space), check=False, capture_output=True)


class Host:
    """A namespace with a home folder, in which programs run."""

    def __init__(self, space: str, folder: Path) -> None:
        self.space, self.folder = space, folder
        folder.mkdir()
        homes = {
            "COMMONWEIGHT_HOME": str(folder / "coordinator"),
            "COMMONWEIGHT_AGENT_HOME": str(folder / "agent"),
            # The default port is free here: the namespace has nothing else.
            "COMMONWEIGHT_PORT": "9092",
        }
        self.env = environment(folder, **homes)

    def line(self, words: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self.space, *command(words, self.env)]

    def run(self, *words: str, given: str = "") -> str:
        done = subprocess.run(
            self.line(list(words)),
            env=self.env,
            input=given,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def running(self, *words: str) -> Iterator[Path]:
        """A program in the background, ended at the end; its output."""
        output = self.folder / "output"
        with output.open("ab") as log:
            process = subprocess.Popen(
                self.line(list(words)),
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield output
        finally:
            process.terminate()
            process.wait(30)


def listening(space: str) -> set[str]:
    """Addresses (host:port) on which somebody listens for TCP in a namespace."""
    done = subprocess.run(
        ("ip", "netns", "exec", space, "ss", "-Hltn"), check=True, capture_output=True, text=True
    )
    return {line.split()[3] for line in done.stdout.splitlines()}


def sent(space: str) -> int:
    """Bytes that a namespace's line has let out."""
    shown = subprocess.run(
        ("ip", "-n", space, "-j", "-s", "link", "show", "eth0"),
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"])


@contextmanager
def three_agents(folder: Path) -> Iterator[tuple[Host, dict[str, Host]]]:
    """A coordinator that is up, and agents that have joined and do not run yet."""
    with networks() as spaces:
        hub = Host(spaces["hub"], folder / "hub")
        hub.run(COORDINATOR, "init", "--san", HUB)
        with hub.running(COORDINATOR, "up", "--host", HUB) as output:
            wait_for(lambda: "is up" in output.read_text(), "the coordinator")
            hosts = {name: Host(spaces[name], folder / name) for name in AGENTS}
            ticket = hub.run(COORDINATOR, "ticket", "create", "--uses", str(len(AGENTS)))

            def join(name: str) -> str:
                return hosts[name].run(AGENT, "join", "-", "--name", name, *ALLOW, given=ticket)

            with ThreadPoolExecutor() as pool:
                assert len(list(pool.map(join, AGENTS))) == len(AGENTS)
            yield hub, hosts


def test_the_one_with_the_quick_line_helps_the_others(tmp_path: Path) -> None:
    with three_agents(tmp_path) as (hub, hosts):
        # Nothing listens where the owner shares nothing.
        hosts["quick"].run(AGENT, "policy", "set", "share", "off")
        with hosts["quick"].running(AGENT, "run"):
            wait_for(lambda: linked(hosts["quick"]), "the agent")
            assert listening(hosts["quick"].space) == set()
        hosts["quick"].run(AGENT, "policy", "set", "share", "lan")
        (hosts["quick"].folder / "agent" / "status.json").unlink()
        with (
            hosts["quick"].running(AGENT, "run"),
            hosts["slow1"].running(AGENT, "run"),
            hosts["slow2"].running(AGENT, "run"),
        ):
            wait_for(lambda: all(listening(host.space) for host in hosts.values()), "the lanes")
            for name, address in AGENTS.items():
                assert {where.rpartition(":")[0] for where in listening(hosts[name].space)} == {
                    address
                }
            wait_for(lambda: all(map(linked, hosts.values())), "three agents")
            before, began = sent(hub.space), time.monotonic()
            words = ("ping", "--rounds", "1", "--quorum", "3", "--set", f"kilobytes={MODEL_KB}")
            started = json.loads(hub.run(COORDINATOR, "run", "start", *words, "--json"))
            run = started["data"]["run"]
            wait_for(lambda: _state(hub, run) == "finished", "the run", within_s=120, every_s=0.3)
            versions = (sent(hub.space) - before) / (MODEL_KB * 1024)
            seconds = time.monotonic() - began
        # Two versions went to three agents: six copies, without help.
        print(f"{versions:.1f} copies of the model left the coordinator in {seconds:.1f} s")
        assert versions < 5


def test_an_agent_whose_address_changes_is_back_before_its_links_time_out(tmp_path: Path) -> None:
    with three_agents(tmp_path) as (hub, hosts):
        moving, log = hosts["slow1"], hosts["slow1"].folder / "agent" / "agent.log"
        with moving.running(AGENT, "run"):
            wait_for(lambda: linked(moving), "the agent")
            old, new = AGENTS["slow1"], "10.77.2.33"
            ip = ("ip", "-n", moving.space)
            do(*ip, "addr", "del", f"{old}/24", "dev", "eth0")
            do(*ip, "addr", "add", f"{new}/24", "dev", "eth0")
            do(*ip, "route", "replace", "default", "via", "10.77.2.1")
            changed = time.monotonic()
            # Not a line of its log: a session that lasts is no new one.
            wait_for(lambda: connected(hub, new, 9092) and connected(hub, new, 9093), "both links")
            print(f"connected {time.monotonic() - changed:.1f} s after the address has changed")
            assert "network has changed" in log.read_text()
            words = ("ping", "--rounds", "1", "--quorum", "1", "--set", "kilobytes=4")
            started = json.loads(hub.run(COORDINATOR, "run", "start", *words, "--json"))
            run = started["data"]["run"]
            wait_for(lambda: _state(hub, run) == "finished", "the run", within_s=120, every_s=0.3)


def connected(hub: Host, address: str, port: int) -> bool:
    """True if this address has a connection to that port of the coordinator's machine."""
    return any(f":{port} " in line and f"{address}:" in line for line in connections(hub.space))


def connections(space: str) -> list[str]:
    """Established TCP connections of a namespace."""
    done = subprocess.run(
        ("ip", "netns", "exec", space, "ss", "-Htn"), check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()


def linked(host: Host) -> bool:
    """True if the agent says that it has both its links."""
    try:
        told = json.loads((host.folder / "agent" / "status.json").read_bytes())
    except FileNotFoundError:
        return False
    return bool(told["session"] and told["mqtt"])


def _state(hub: Host, run: str) -> str:
    told = json.loads(hub.run(COORDINATOR, "run", "show", run, "--json"))["data"]
    assert told["state"] not in ("failed", "stopped"), told
    return str(told["state"])
