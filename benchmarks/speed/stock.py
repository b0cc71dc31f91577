"""Stock Flower as documented: SuperLink, SuperNodes, `flwr run`, without TLS on loopback.

All files are in a temporary folder; telemetry, update check and run-time installation are off.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.speed.cases import Case
from benchmarks.speed.figures import Figures
from benchmarks.speed.processes import Peaks, cpu_s, family
from benchmarks.speed.relay import Relay
from tests.support.fleet_harness import HOST, alive, free_port
from tests.support.waiting import wait_for

_APP = Path(__file__).parent / "stock_app"
_SCRIPTS = Path(sysconfig.get_path("scripts"))
#: The names of the processes, by a word in their command line.
_KINDS = {
    "flower-superlink": "superlink",
    "flower-supernode": "supernode",
    "flower-superexec": "superexec",
    "flwr-serverapp": "serverapp",
    "flwr-clientapp": "clientapp",
}
#: The processes on the server's machine that have the model.
SERVER = ("superlink", "serverapp")
#: Far more than a round of 400 MB takes.
_ROUND_WITHIN_S = 400.0


def run(case: Case, folder: Path, *, counted: bool = False) -> Figures:
    """A pass of `case`. `counted`: through a relay that counts, so its times mean nothing."""
    rounds = case.stock_rounds
    times = folder / "times.jsonl"
    times.touch()
    with _site(case.agents, folder, counted=counted) as site:
        resting = {}
        for process in family(site.pids):
            with contextlib.suppress(psutil.NoSuchProcess):  # a short-lived child
                resting[_kind(process)] = process.memory_info().rss
        site.start_run(case.kilobytes, rounds + 1, times)
        site.until_ended(times, 1)
        cpu, bytes_before = cpu_s(site.pids), site.counted()
        site.until_ended(times, rounds + 1)
        cpu = cpu_s(site.pids) - cpu
        up, down = (now - then for now, then in zip(site.counted(), bytes_before, strict=True))
        site.peaks.look(site.pids)
        return Figures(
            seconds=round_times(times)[1:],
            cpu_s_per_round={"all": cpu / rounds},
            peak_rss_bytes=dict(site.peaks.most),
            resting_rss_bytes=resting,
            bytes_up=up // rounds,
            bytes_down=down // rounds,
        )


def round_times(times: Path) -> list[float]:
    """Seconds of each ended round, from the file of the app."""
    began: dict[int, float] = {}
    seconds: list[float] = []
    for line in times.read_text().splitlines():
        noted = json.loads(line)
        if "began" in noted:
            began[noted["round"]] = noted["began"]
        else:
            seconds.append(noted["ended"] - began[noted["round"]])
    return seconds


class _Site:
    """A running SuperLink with its SuperNodes."""

    def __init__(self, folder: Path, relayed: bool) -> None:
        self._folder = folder
        self.port = free_port()
        self.relay = Relay(self.port) if relayed else None
        self._programs: list[subprocess.Popen[bytes]] = []
        self.peaks = Peaks(_kind)
        self.env = {
            name: value for name, value in os.environ.items() if not name.startswith("FLWR_")
        } | {
            "PATH": f"{_SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }
        (folder / "flwr").mkdir(exist_ok=True)
        (folder / "flwr" / "config.toml").write_text(
            '[superlink]\ndefault = "bench"\n\n'
            f'[superlink.bench]\naddress = "{HOST}:{self.port}"\ninsecure = true\n'
        )
        shutil.copytree(_APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))

    @property
    def pids(self) -> list[int]:
        return [program.pid for program in self._programs]

    def start(self, *words: str, port: int) -> None:
        """Start one of Flower's programs."""
        with (self._folder / f"{words[0]}-{port}.log").open("wb") as log:
            program = subprocess.Popen(
                [_SCRIPTS / words[0], *words[1:]],
                env=self.env,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._programs.append(program)

    def until_all_listen(self, ports: list[int]) -> None:
        def listen() -> bool:
            assert all(p.poll() is None for p in self._programs), "one of Flower's programs ended"
            return all(_listens(port) for port in ports)

        wait_for(listen, "Flower's programs listen")

    def start_run(self, kilobytes: int, rounds: int, times: Path) -> None:
        """Start the app with `flwr run`, which returns at once."""
        agents = len(self.pids) - 1
        config = f'kilobytes={kilobytes} rounds={rounds} agents={agents} times="{times}"'
        done = subprocess.run(
            [_SCRIPTS / "flwr", "run", self._folder / "app", "bench", "--run-config", config],
            env=self.env,
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"flwr run: {done.stdout}{done.stderr}"

    def until_ended(self, times: Path, rounds: int) -> None:
        wait_for(
            lambda: len(round_times(times)) >= rounds,
            f"stock Flower ended round {rounds}",
            within_s=_ROUND_WITHIN_S * rounds,
        )

    def counted(self) -> tuple[int, int]:
        """Bytes up and down so far, if a relay counts them."""
        return self.relay.counted() if self.relay else (0, 0)

    def logs(self) -> str:
        return "\n".join(
            f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}"
            for log in sorted(self._folder.glob("*.log"))
        )

    def close(self) -> None:
        """End every process that we started, and their descendants."""
        self.peaks.end()
        left = family(self.pids)
        for program in reversed(self._programs):
            with contextlib.suppress(ProcessLookupError):
                program.terminate()
        for program in self._programs:
            try:
                program.wait(10)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()
        _, left = psutil.wait_procs([*left, *self.peaks.seen], timeout=3)
        for process in alive(left):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.relay is not None:
            self.relay.close()


@contextlib.contextmanager
def _site(agents: int, folder: Path, *, counted: bool) -> Iterator[_Site]:
    site = _Site(folder, counted)
    try:
        site.start(
            "flower-superlink",
            *("--insecure", "--host", HOST, "--port", str(site.port)),
            "--disable-runtime-dependency-installation",
            port=site.port,
        )
        site.until_all_listen([site.port])
        superlink = site.relay.port if site.relay else site.port
        ports = [free_port() for _ in range(agents)]
        for port in ports:
            site.start(
                "flower-supernode",
                *("--insecure", "--superlink", f"{HOST}:{superlink}"),
                *("--host", HOST, "--port", str(port)),
                port=port,
            )
        site.until_all_listen(ports)
        site.peaks.follow(site.pids)
        yield site
    except BaseException:
        print(site.logs())
        raise
    finally:
        site.close()


def _kind(process: psutil.Process) -> str:
    words = " ".join(process.cmdline())
    return next((name for word, name in _KINDS.items() if word in words), "other")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
