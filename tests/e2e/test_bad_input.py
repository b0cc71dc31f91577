"""Bad input gets a clear error with its own exit code, and nothing is lost by it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fleet_harness import (
    AGENT,
    COORDINATOR,
    HOST,
    Fleet,
    environment,
    fleet,
    run_program,
)
from tests.support.waiting import wait_for

HEAVY = ("flwr", "torch", "textual")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A coordinator with one agent, for all tests of this file."""
    with fleet(tmp_path_factory.mktemp("site")) as made:
        made.up()
        made.join("ada")
        made.start("ada")
        yield made


def fails(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """It ended with this code and said all of this, and no traceback."""
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said
    for word in words:
        assert word in said, said


# --- tickets ---------------------------------------------------------------------------------


def test_a_cut_ticket_is_told_before_anything_is_sent(site: Fleet) -> None:
    ticket = site.ticket()
    for broken in (ticket[:-7], ticket[:40] + "x" + ticket[41:], "", "hello"):
        fails(site.ask_agent("eve", "join", "-", given=broken), 2, "ticket")
    assert site.ask_agent("eve", "join", "-", given=f"  {ticket}\n").returncode == 0


def test_a_used_ticket_is_refused(site: Fleet) -> None:
    ticket = site.ticket()
    assert site.ask_agent("first", "join", "-", given=ticket).returncode == 0
    fails(site.ask_agent("second", "join", "-", given=ticket), 4, "was used already", "ticket")
    fails(site.ask_agent("second", "run"), 4, "has not joined")


def test_joining_twice_asks_for_replace(site: Fleet) -> None:
    fails(site.ask_agent("ada", "join", "-", given=site.ticket()), 1, "--replace")


def test_an_unknown_agent_has_nothing_to_run(tmp_path: Path) -> None:
    env = environment(tmp_path, COMMONWEIGHT_AGENT_HOME=str(tmp_path / "none"))
    fails(run_program([AGENT, "run"], env), 5, "commonweight-agent join TICKET")
    fails(run_program([AGENT, "status"], env), 5, "commonweight-agent join TICKET")


# --- runs ------------------------------------------------------------------------------------


def test_a_run_that_cannot_be_is_refused_before_its_start(site: Fleet) -> None:
    for words, said in (
        (["chess"], ["'chess'", "mnist", "ping"]),
        (["ping", "--quorum", "99"], ["a quorum of 99 cannot be met", "--quorum"]),
        (["ping", "--deadline", "0"], ["deadline"]),
        (["ping", "--deadline", "soon"], ["'soon'", "90s"]),
        (["ping", "--rounds", "-1"], ["--rounds"]),
        (["ping", "--strategy", "wish"], ["'wish'", "fedavg"]),
        (["ping", "--set", "kilobytes"], ["key=value"]),
        (["ping", "--weighting", "luck"], ["examples or equal"]),
        (["ping", "--from", "/none.safetensors"], ["/none.safetensors"]),
        (["mnist", "--best-metric", "f1score"], ["'f1score'", "macro_f1"]),
        (["mnist", "--target", "f1score=0.9"], ["'f1score'", "macro_f1"]),
        (["mnist", "--target", "loss=0.1", "--best-metric", "accuracy"], ["two metrics"]),
        (["ping", "--patience", "3"], ["'accuracy or loss'", "it has none"]),
    ):
        fails(site.ask("run", "start", *words), 2, *said)
    fails(site.ask("run", "show", "nothing"), 2, "no run 'nothing'")
    fails(site.ask("peers", "pause", "nobody"), 2, "no peer 'nobody'")
    assert [run["state"] for run in site.data("run", "list")] == []


def test_with_json_the_error_is_an_envelope(site: Fleet) -> None:
    done = site.ask("run", "start", "chess", "--json")
    assert done.returncode == 2
    told = json.loads(done.stdout)
    assert (told["schema_version"], told["status"]) == (1, "error")
    assert told["error"]["code"] == "unknown_name"
    assert "ping" in told["error"]["hint"]


def test_a_setting_that_the_task_does_not_know_starts_no_run(site: Fleet) -> None:
    refused = site.ask("run", "start", "ping", "--rounds", "1", "--set", "speed=9")
    fails(refused, 2, "the task has no setting 'speed'")
    again = site.ended_run(site.start_run("ping", "--rounds", "1"))
    assert again["state"] == "finished"


def test_what_a_task_reads_is_told_once_to_a_peer_without_data(site: Fleet) -> None:
    ended = site.ended_run(site.start_run("tabular", "--target", "price", "--quorum", "1"))
    why = "no data are set on this machine, and the task tabular reads a CSV or Parquet file"
    assert ended["ended_because"].startswith(f"no peer can take part: {why}")
    told = [text for text in site.events() if why in text]
    assert [text.partition(":")[0] for text in told] == ["refused ada"], "once"
    shown = site.ask("run", "show", ended["id"]).stdout
    assert shown.count(why) == 1
    wait_for(
        lambda: "policy set data" in site.ask_agent("ada", "status").stdout,
        "the owner's next step is in the status file, which is written with the next tick",
    )


# --- homes and ports -------------------------------------------------------------------------


def test_a_follower_hears_what_a_run_waits_for_and_ctrl_c_does_not_end_the_run(
    site: Fleet,
) -> None:
    assert site.ask_agent("ada", "pause").returncode == 0
    assert site.agent("ada")["state"] == "paused", "it says so when it is so"
    following = site.background("follow", "run", "start", "ping", "--follow")
    try:
        wait_for(lambda: "  ada: ‖ paused: by its owner" in following.log, "it hears why")
        assert "waits for 1 more peer for the quorum" in following.log
        assert "on that machine: commonweight-agent resume" in following.log
        following.process.send_signal(signal.SIGINT)
        assert following.wait() == 130
        assert " continues; watch it: commonweight run show ping-" in following.log
        assert "Traceback" not in following.log
        (run,) = [run for run in site.data("run", "list") if run["state"] == "waiting"]
        assert site.ask("run", "stop", run["id"]).returncode == 0
    finally:
        assert site.ask_agent("ada", "resume").returncode == 0
        assert site.agent("ada")["state"] != "paused"


def test_rows_leave_only_after_a_yes(site: Fleet, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("a,b\n1,2\n")
    fails(site.ask("infer", "--scatter", "none.csv", "--yes"), 2, "there is no file none.csv")
    words = ("infer", "--scatter", str(rows), "--model", "best", "--out", str(tmp_path / "o.csv"))
    fails(site.ask(*words), 2, "nothing was sent", "no terminal", "--yes")
    fails(site.ask(*words, "--json"), 2, "nothing was sent")


def test_a_port_in_use_is_named_with_the_option(site: Fleet, tmp_path: Path) -> None:
    port = json.loads((site.home / "up.json").read_bytes())["address"].rpartition(":")[2]
    env = environment(tmp_path, COMMONWEIGHT_HOME=str(tmp_path / "other"))
    words = [COORDINATOR, "up", "--host", HOST]
    fails(run_program([*words, "--port", port], env), 1, port, "in use", "--port")
    taken = run_program([*words, "--port", "0", "--mqtt-port", port], env)
    fails(taken, 1, port, "in use", "--mqtt-port")


def test_a_second_coordinator_or_agent_in_one_home_is_refused(site: Fleet) -> None:
    fails(site.ask("up", "--port", "0"), 1, "another coordinator uses", str(site.home))
    fails(site.ask_agent("ada", "run"), 1, "another agent uses", str(site.folder / "ada"))
    site.until_agent("ada", "is unharmed", lambda told: told["session"])


def test_commands_without_a_coordinator_say_how_to_start_one(tmp_path: Path) -> None:
    env = environment(tmp_path, COMMONWEIGHT_HOME=str(tmp_path / "home"))
    fails(run_program([COORDINATOR, "status"], env), 5, "commonweight init")
    assert run_program([COORDINATOR, "init"], env).returncode == 0
    for words in (["status"], ["run", "list"], ["ticket", "create"], ["monitor", "--once"]):
        code = 3 if words[0] == "monitor" else 5
        fails(run_program([COORDINATOR, *words], env), code, "commonweight up")


@pytest.mark.parametrize(
    ("program", "variable", "command"),
    [(COORDINATOR, "COMMONWEIGHT_HOME", "up"), (AGENT, "COMMONWEIGHT_AGENT_HOME", "run")],
)
class TestHomes:
    def test_of_a_newer_version(
        self, tmp_path: Path, program: str, variable: str, command: str
    ) -> None:
        kind = "coordinator" if program == COORDINATOR else "agent"
        stamp = json.dumps({"format": 99, "kind": kind, "written_by": "7.0.0"})
        (tmp_path / "home.json").write_text(stamp)
        done = run_program([program, command], environment(tmp_path, **{variable: str(tmp_path)}))
        fails(done, 1, "7.0.0", "format 99", "update commonweight")
        assert (tmp_path / "home.json").read_text() == stamp

    def test_where_a_file_lies(
        self, tmp_path: Path, program: str, variable: str, command: str
    ) -> None:
        file = tmp_path / "file"
        file.touch()
        done = run_program([program, command], environment(tmp_path, **{variable: str(file)}))
        fails(done, 1, str(file), variable)

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
    def test_without_permission_to_write(
        self, tmp_path: Path, program: str, variable: str, command: str
    ) -> None:
        home = tmp_path / "locked" / "home"
        home.parent.mkdir(mode=0o500)
        done = run_program([program, command], environment(tmp_path, **{variable: str(home)}))
        fails(done, 1 if command == "up" else 5, str(home))


# --- what is imported ------------------------------------------------------------------------


@pytest.mark.parametrize("program", [COORDINATOR, AGENT])
def test_help_imports_nothing_heavy(tmp_path: Path, program: str) -> None:
    code = (
        f"import sys, runpy\nsys.argv = ['x', '--help']\n"
        f"try:\n    runpy.run_module({program!r}, run_name='__main__')\n"
        f"except SystemExit as end:\n    print('code', end.code)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-2:] == ["code 0", "[]"]
    assert "Usage" in done.stdout


def test_the_coordinator_at_work_has_never_loaded_torch(site: Fleet) -> None:
    pid = site.programs["up"].process.pid
    maps = Path(f"/proc/{pid}/maps")
    if maps.exists():
        libraries = maps.read_text()
        assert "numpy" in libraries, "the libraries of the process are listed"
        assert "torch" not in libraries
        return
    code = (
        "import sys, coordinator.cli, coordinator.daemon.coordinator; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment(site.folder),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_an_agent_at_work_has_never_loaded_torch(site: Fleet) -> None:
    maps = Path(f"/proc/{site.programs['ada'].process.pid}/maps")
    if not maps.exists():
        pytest.skip("this system has no /proc")
    assert "torch" not in maps.read_text()
