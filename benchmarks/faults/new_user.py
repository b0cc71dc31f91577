"""python -m benchmarks.faults.new_user [--install] [--ipv6]

Times a new user's first steps: three machines (network namespaces) with only Python, and only the
commands of the docs. Then the link of a laptop goes down and up, its address changes, and it
sleeps. With --install, packages are installed from the index into an empty environment.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.speed.report import machine
from tests.support import wheels
from tests.support.fleet_harness import ROOT
from tests.support.waiting import wait_for

HOSTS = ("hub", "ada", "bob")


def do(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


class Network:
    """An Ethernet with three machines, with IPv4 or with IPv6 only."""

    def __init__(self, ipv6: bool) -> None:
        self.ipv6 = ipv6
        self.prefix = f"cwn{os.getpid() % 100000}"
        self._numbers = {name: number + 2 for number, name in enumerate(HOSTS)}

    def space(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def address(self, name: str) -> str:
        number = self._numbers[name]
        return f"fd77::{number}" if self.ipv6 else f"10.78.3.{number}"

    def up(self) -> None:
        for name in ("switch", *HOSTS):
            do("ip", "netns", "add", self.space(name))
            do("ip", "-n", self.space(name), "link", "set", "lo", "up")
        switch = self.space("switch")
        do("ip", "-n", switch, "link", "add", "lan", "type", "bridge")
        do("ip", "-n", switch, "link", "set", "lan", "up")
        for name in HOSTS:
            port = f"to-{name}"
            do("ip", "-n", switch, "link", "add", port, "type", "veth",
               "peer", "name", "eth0", "netns", self.space(name))  # fmt: skip
            do("ip", "-n", switch, "link", "set", port, "up", "master", "lan")
            do("ip", "-n", self.space(name), "link", "set", "eth0", "up")
            self.give_address(name)

    def give_address(self, name: str) -> None:
        width, more = ("64", ["nodad"]) if self.ipv6 else ("24", [])
        space = self.space(name)
        do("ip", "-n", space, "addr", "add", f"{self.address(name)}/{width}", "dev", "eth0", *more)

    def change_address(self, name: str) -> None:
        """Change the address, as after a change from Wi-Fi to cable."""
        do("ip", "-n", self.space(name), "addr", "flush", "dev", "eth0", "scope", "global")
        self._numbers[name] += 50
        self.give_address(name)

    def link(self, name: str, state: str) -> None:
        do("ip", "-n", self.space(name), "link", "set", "eth0", state)
        if state == "up" and self.ipv6:  # IPv6 addresses are lost with the link
            self.give_address(name)

    def down(self) -> None:
        for name in ("switch", *HOSTS):
            subprocess.run(["ip", "netns", "del", self.space(name)], check=False)


class Machines:
    """The folders and programs of the machines, and the duration of each command."""

    def __init__(self, network: Network, folder: Path, scripts: Path) -> None:
        self._network, self._folder, self._scripts = network, folder, scripts
        self._running: list[subprocess.Popen[bytes]] = []
        self.took: list[tuple[str, float]] = []

    def _command(self, host: str, line: str) -> tuple[list[str], dict[str, str]]:
        home = self._folder / host
        home.mkdir(exist_ok=True)
        env = {
            "HOME": str(home),
            "PATH": f"{self._scripts}:/usr/bin:/bin",
            "COMMONWEIGHT_AGENT_WORK": "always",  # other programs use this one machine's cores
        }
        words = line.split()
        program = str(self._scripts / words[0])
        return ["ip", "netns", "exec", self._network.space(host), program, *words[1:]], env

    def ask(self, host: str, line: str, given: str = "") -> str:
        words, env = self._command(host, line)
        began = time.monotonic()
        done = subprocess.run(words, env=env, input=given, capture_output=True, text=True)
        self.took.append((f"{host}: {line}", time.monotonic() - began))
        print(f"{self.took[-1][1]:6.2f} s  {host}: {line}", file=sys.stderr, flush=True)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def begin(self, host: str, line: str) -> subprocess.Popen[bytes]:
        words, env = self._command(host, line)
        with (self._folder / f"{host}.log").open("ab") as log:
            process = subprocess.Popen(words, env=env, stdout=log, stderr=log)
        self._running.append(process)
        return process

    def status(self, host: str) -> dict[str, Any]:
        file = self._folder / host / ".local/share/commonweight/agent/status.json"
        try:
            told: dict[str, Any] = json.loads(file.read_bytes())
        except FileNotFoundError:
            return {}
        return told

    def close(self) -> None:
        for process in reversed(self._running):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in self._running:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def site(ipv6: bool, scripts: Path) -> Iterator[tuple[Network, Machines]]:
    network = Network(ipv6)
    with tempfile.TemporaryDirectory() as place:
        machines = Machines(network, Path(place), scripts)
        try:
            network.up()
            yield network, machines
        except BaseException:
            for log in Path(place).glob("*.log"):
                print(f"--- {log.name}\n{log.read_text()[-3000:]}", file=sys.stderr)
            raise
        finally:
            machines.close()
            network.down()


def first_run(network: Network, machines: Machines) -> float:
    """The steps of docs/machines.md; returns the seconds until the first run has ended."""
    began = time.monotonic()
    machines.ask("hub", "commonweight init")
    machines.begin("hub", "commonweight up" + " --host ::" * network.ipv6)

    def answers() -> bool:
        try:
            machines.ask("hub", "commonweight status")
        except AssertionError:
            return False
        return True

    wait_for(answers, "the coordinator is up", every_s=0.5)
    for name in ("ada", "bob"):
        ticket = machines.ask("hub", "commonweight ticket create").strip()
        machines.ask(name, f"commonweight-agent join - --name {name} --allow ping", given=ticket)
        machines.begin(name, "commonweight-agent run")
    for name in ("ada", "bob"):
        wait_for(lambda name=name: machines.status(name).get("session"), f"{name} is connected")
    machines.ask("hub", "commonweight run start ping --rounds 3 --quorum 2 --follow")
    return time.monotonic() - began


def back_after(
    machines: Machines, name: str, lost: Callable[[], None], back: Callable[[], None]
) -> float:
    """Seconds from the network's return until the agent takes part again."""
    lost()
    time.sleep(45)  # longer than Flower's timeout, so the session is lost
    back()
    began = time.monotonic()
    machines.ask("hub", "commonweight run start ping --rounds 1 --quorum 2 --follow")
    return time.monotonic() - began


def main() -> None:
    # Handle SIGTERM like Ctrl-C, so that namespaces and programs end as well.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults.new_user", description=__doc__
    )
    parser.add_argument("--install", action="store_true", help="from the index, into nothing")
    parser.add_argument("--ipv6", action="store_true", help="IPv6 alone")
    asked = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "network": "IPv6" if asked.ipv6 else "IPv4"}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made = wheels.wheel(ROOT, folder / "wheel")
        began = time.monotonic()
        if asked.install:
            do(sys.executable, "-m", "venv", str(folder / "env"))
            do(str(wheels.python_in(folder / "env")), "-m", "pip", "install", "--quiet", str(made))
            results["pip install commonweight, s"] = round(time.monotonic() - began, 1)
        else:
            wheels.installed(made, folder / "env")
        with site(asked.ipv6, folder / "env" / wheels.SCRIPTS) as (network, machines):
            results["init to the end of the first run, s"] = round(first_run(network, machines), 1)
            results["commands, s"] = {line: round(s, 2) for line, s in machines.took}
            agent = machines._running[-1]
            changes: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
                "link down and up": (
                    lambda: network.link("bob", "down"),
                    lambda: network.link("bob", "up"),
                ),
                "another address": (lambda: None, lambda: network.change_address("bob")),
                "sleep": (
                    lambda: os.kill(agent.pid, signal.SIGSTOP),
                    lambda: os.kill(agent.pid, signal.SIGCONT),
                ),
            }
            results["takes part again after, s"] = {
                name: round(back_after(machines, "bob", *change), 1)
                for name, change in changes.items()
            }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
