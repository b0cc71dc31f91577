"""What an owner types: policy, logs, leaving, and the small commands."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.cli import serve
from agent.cli.models import LATEST, Use
from agent.home import enrollment_file, logs, own_results, settings
from agent.home.own_results import OwnResult, OwnRun
from agent.home.settings_schema import AgentSettings
from agent.inference.server import ServedModel
from protocols.errors import UnknownName, UsageError
from protocols.local.atomic_files import write_private
from tests.support.fleet_harness import (
    AGENT,
    Fleet,
    Program,
    environment,
    fleet,
    run_program,
    two_free_ports,
)
from tests.support.waiting import wait_for


def agent(home: Path, *words: str, **variables: str) -> tuple[int, str, str]:
    """`commonweight-agent words…` over this home: exit status, stdout, stderr."""
    env = environment(home.parent, COMMONWEIGHT_AGENT_HOME=str(home))
    del env["COMMONWEIGHT_AGENT_THREADS"]
    done = run_program([AGENT, *words], env | variables)
    return done.returncode, done.stdout, done.stderr


def test_every_command_has_its_help(agent_home: Path) -> None:
    code, said, _ = agent(agent_home, "--help")
    assert code == 0
    for command in (
        "join", "up", "status", "leave", "pause", "policy", "service", "logs", "doctor",
    ):  # fmt: skip
        assert re.search(rf"^  {command}  +\w", said, re.MULTILINE), command


# --- policy ----------------------------------------------------------------------------------


def test_policy_says_where_each_value_comes_from(agent_home: Path) -> None:
    assert agent(agent_home, "policy", "set", "tasks", "mnist, ping")[0] == 0
    code, said, _ = agent(agent_home, "policy", "show", "--json", COMMONWEIGHT_AGENT_THREADS="3")
    assert code == 0
    found = {one["name"]: one for one in json.loads(said)["data"]}
    assert set(found) == set(AgentSettings.__struct_fields__)
    assert all(len(one["about"]) > 10 for one in found.values())
    assert (found["tasks"]["value"], found["tasks"]["source"]) == (
        ["mnist", "ping"], "settings.toml"
    )  # fmt: skip
    assert (found["threads"]["value"], found["threads"]["source"]) == (
        3, "COMMONWEIGHT_AGENT_THREADS"
    )  # fmt: skip
    assert (found["split"]["value"], found["split"]["source"]) == ("iid", "default")
    _, said, _ = agent(agent_home, "policy", "show")
    assert re.search(
        r"^tasks +mnist,ping +settings.toml\n    tasks that you allow", said, re.MULTILINE
    )


def test_policy_tells_a_wrong_number_and_what_a_path_opens(agent_home: Path) -> None:
    code, _, err = agent(agent_home, "policy", "set", "min_batch", "-3")
    assert code == 2
    assert "min_batch must be a whole number, at least 1; not '-3'" in err
    code, _, err = agent(agent_home, "policy", "set", "sandbox_read", f"{agent_home.parent},none")
    assert code == 0
    assert "tasks may read the agent's keys" in err
    assert f"{Path('none').absolute()} does not exist yet" in err


def test_a_mode_for_a_while_that_is_none_is_told_in_a_sentence(agent_home: Path) -> None:
    code, _, err = agent(agent_home, "policy", "set", "busy", "2", "--for", "1h")
    assert code == 2
    assert "busy must be one of always, auto, never; not '2'" in err
    assert "commonweight-agent policy set busy always --for 2h" in err


@pytest.mark.parametrize(
    ("key", "value", "code", "told"),
    [
        (
            "analyze.operations",
            "count,meen",
            2,
            "there is no operation 'meen'\n  try: known: count",
        ),
        ("jobs_private_models", "foo", 2, "'foo' is no digest of a model"),
        ("data_reader", "duckdb", 2, "cannot be 'duckdb'; it takes a reader for tables: arrow"),
        ("device", "gpu", 2, "cannot be 'gpu'; it takes a device for training: auto, cpu, mps"),
        ("device", "cuda:", 2, "cannot be 'cuda:'; it takes a device for training"),
        ("tasks", "mnsit", 0, "this machine has no task 'mnsit'; commonweight-agent task list"),
        ("models", "nowhere", 0, "nowhere yet"),
    ],
)
def test_a_name_that_means_nothing_here_is_no_silent_success(
    agent_home: Path, key: str, value: str, code: int, told: str
) -> None:
    done, _, err = agent(agent_home, "policy", "set", key, value)
    assert (done, told in err) == (code, True), err


@pytest.mark.parametrize(
    ("words", "told", "not_told"),
    [
        (("-", "--battery", "sometimes"), "battery must be one of always, auto", "settings.toml"),
        (("-", "--label", "foo"), "for example site=north", "lr=0.1"),
        (("-",), "there is no ticket on standard input", "cw1."),
        ((), "there is no ticket on standard input", "GetPassWarning"),
    ],
)
def test_a_join_without_a_terminal_says_what_it_lacks(
    agent_home: Path, words: tuple[str, ...], told: str, not_told: str
) -> None:
    given = "cw1.x" if "--battery" in words or "--label" in words else ""
    env = environment(agent_home.parent, COMMONWEIGHT_AGENT_HOME=str(agent_home))
    done = run_program([AGENT, "join", *words], env, given=given)
    assert done.returncode == 2
    assert told in done.stderr
    assert not_told not in done.stderr


def test_a_wrong_number_is_told_in_words_that_a_person_uses(agent_home: Path) -> None:
    code, _, err = agent(agent_home, "logs", "-n", "many")
    assert code == 2
    assert "'many' is not a whole number" in err


def test_a_note_without_a_charge_is_refused(agent_home: Path) -> None:
    code, out, err = agent(agent_home, "budget", "--note", "a poster")
    assert (code, out) == (2, "")
    assert "--note belongs to --add" in err


def test_policy_writes_only_what_was_set(agent_home: Path) -> None:
    agent(agent_home, "policy", "set", "threads", "2")
    assert (agent_home / "settings.toml").read_text() == "threads = 2\n"
    code, _, said = agent(
        agent_home, "policy", "set", "threads", "4", COMMONWEIGHT_AGENT_THREADS="3"
    )
    assert code == 0
    assert "COMMONWEIGHT_AGENT_THREADS is set and overrides it" in said
    assert settings.read(agent_home).threads == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("colour", "red"), "there is no setting 'colour'"),
        (("threads", "many"), "threads"),
        (("threads", "-1"), "threads"),
        (("part", "3"), "part 3 of 1"),
        (("split", "odd"), "split"),
    ],
)
def test_what_policy_refuses_changes_nothing(
    agent_home: Path, words: tuple[str, str], said: str
) -> None:
    code, out, err = agent(agent_home, "policy", "set", "--", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert not (agent_home / "settings.toml").exists()


def test_an_unknown_setting_is_refused_with_the_command_that_shows_all(agent_home: Path) -> None:
    with pytest.raises(UnknownName) as caught:
        settings.change(agent_home, colour="red")
    assert caught.value.hint == "commonweight-agent policy show"
    with pytest.raises(UnknownName) as caught:
        settings.change(agent_home, dta="x.csv")
    assert caught.value.message == "there is no setting 'dta'; did you mean data?"
    assert caught.value.hint == "commonweight-agent policy show"
    with pytest.raises(UsageError):
        settings.change(agent_home, threads=-1)


# --- logs ------------------------------------------------------------------------------------


def logged(home: Path, *texts: str) -> None:
    with (home / logs.FILE).open("a") as file:
        for text in texts:
            file.write(json.dumps({"at": 1.0, "level": "info", "name": "n", "message": text}))
            file.write("\n")


def test_the_last_lines_of_the_log(agent_home: Path) -> None:
    code, out, err = agent(agent_home, "logs")
    assert (code, out) == (0, "")
    assert "the log is empty" in err
    logged(agent_home, *(f"line {number}" for number in range(60)))
    _, out, _ = agent(agent_home, "logs")
    assert [line[20:] for line in out.splitlines()] == [f"info: line {n}" for n in range(10, 60)]
    _, out, _ = agent(agent_home, "logs", "-n", "2", "--json")
    assert [json.loads(line)["message"] for line in out.splitlines()] == ["line 58", "line 59"]
    assert agent(agent_home, "logs", "-n", "0")[1] == ""


@pytest.fixture
def following(agent_home: Path) -> Iterator[Program]:
    logged(agent_home, "before")
    env = environment(agent_home.parent, COMMONWEIGHT_AGENT_HOME=str(agent_home))
    program = Program([AGENT, "logs", "-f"], env, agent_home.parent / "followed")
    yield program
    program.kill()


def test_following_goes_on_through_rotation(agent_home: Path, following: Program) -> None:
    wait_for(lambda: "info: before" in following.log, "the first lines")
    writing = RotatingFileHandler(agent_home / logs.FILE, "a", 150, logs.ROTATED_FILES)
    for number in range(8):
        text = json.dumps({"at": 1.0, "level": "info", "message": f"line {number} {'x' * 60}"})
        writing.emit(logging.LogRecord("n", 20, "", 0, text, None, None))
        wait_for(lambda number=number: f"info: line {number}" in following.log, f"line {number}")
    writing.close()
    assert (agent_home / f"{logs.FILE}.3").exists()
    found = re.findall(r"info: (?:line )?(\w+)", following.log)
    assert found == ["before", *map(str, range(8))]


# --- leaving ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet(tmp_path_factory.mktemp("site")) as made:
        made.up()
        yield made


def standing(site: Fleet, name: str) -> list[str]:
    return [peer["standing"] for peer in site.data("peers", "list") if peer["name"] == name]


def events(site: Fleet, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = site.data("audit", "--peer", name)
    return found


@pytest.mark.long
def test_an_agent_that_leaves_is_refused_from_then_on(site: Fleet) -> None:
    site.join("one")
    site.start("one")
    home = site.folder / "one"
    done = site.ask_agent("one", "leave", "--yes")
    assert done.returncode == 1, "while it runs"
    assert "is running" in done.stderr
    assert site.programs["one"].stop() == 0
    (home / "settings.toml").touch()
    (home / "data.csv").write_text("mine")

    done = site.ask_agent("one", "leave")
    assert done.returncode == 2, "not without a yes"
    assert "add --yes" in done.stderr
    kept = (home / "enrolled.json").read_bytes()
    keys = {name: (home / name).read_bytes() for name in ("sign.key", "node.key")}

    done = site.ask_agent("one", "leave", "--yes")
    assert done.returncode == 0, done.stderr
    for gone in ("enrolled.json", "sign.key", "node.key", "status.json", "cache", "outbox"):
        assert not (home / gone).exists(), gone
    assert (home / "data.csv").read_text() == "mine"
    assert (home / "settings.toml").exists()
    assert standing(site, "one") == ["removed"]
    assert [event["event"] for event in events(site, "one")] == ["joined", "removed"]
    assert events(site, "one")[-1]["reason"] == "left by itself"
    assert "one" not in {peer["name"] for peer in site.data("status")["peers"].values()}

    # A copy of the old keys is worth nothing.
    write_private(home / "enrolled.json", kept)
    for name, key in keys.items():
        write_private(home / name, key)
    done = site.ask_agent("one", "leave", "--yes")
    assert done.returncode == 4
    assert "--offline" in done.stderr
    assert (home / "enrolled.json").exists()
    assert site.ask_agent("one", "leave", "--yes", "--offline").returncode == 0
    site.join("one")
    assert standing(site, "one") == ["removed", "enrolled"]


def test_one_that_still_awaits_approval_can_leave(tmp_path: Path) -> None:
    with fleet(tmp_path) as made:
        made.up("--approve")
        made.join("shy")
        assert made.ask_agent("shy", "leave", "--yes").returncode == 0
        assert standing(made, "shy") == ["removed"]


@pytest.mark.long
def test_leaving_a_coordinator_that_does_not_answer(site: Fleet) -> None:
    site.join("two")
    home = site.folder / "two"
    enrollment = enrollment_file.read_enrollment(home)
    nowhere = msgspec.structs.replace(enrollment, addresses=(f"127.0.0.1:{two_free_ports()[0]}",))
    enrollment_file.write_enrollment(home, nowhere)
    done = site.ask_agent("two", "leave", "--yes")
    assert done.returncode == 3
    assert "does not answer" in done.stderr
    assert "commonweight-agent leave --yes --offline" in done.stderr
    assert (home / "sign.key").exists()
    done = site.ask_agent("two", "leave", "--yes", "--offline")
    assert done.returncode == 0
    assert "commonweight peers remove two" in done.stderr
    assert not (home / "sign.key").exists()
    assert standing(site, "two") == ["enrolled"], "nobody told the coordinator"
    assert site.ask_agent("two", "leave", "--yes").returncode == 4
    assert site.ask_agent("two", "status").returncode == 5


def test_an_agent_exits_at_once_while_a_connection_is_being_made(site: Fleet) -> None:
    """One end of the handshake waits: a coordinator that is stopping, or a network that drops."""
    site.join("five")
    enrollment = enrollment_file.read_enrollment(site.folder / "five")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        changed = msgspec.structs.replace(enrollment, addresses=(address,))
        enrollment_file.write_enrollment(site.folder / "five", changed)
        program = site._start("five", [AGENT, "run"], site._env("five"))
        accepted, _ = silent.accept()
        with accepted:
            assert accepted.recv(1), "the handshake has begun"
            assert program.stop() == 0
    log = program.log
    assert "agent stopped" in log
    assert "did not exit" not in log


# --- the small ones --------------------------------------------------------------------------


def test_a_kept_version_is_verified_when_it_is_used(
    site: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site.join("six")
    folder = own_results.folder_of(site.folder / "six", "tabular-1")
    folder.mkdir(parents=True)
    run = OwnRun(run="tabular-1", task="tabular", settings={}, is_local=False)
    result = OwnResult(run="tabular-1", task="tabular", at=0.0, round=3, digest="d" * 64)
    own_results.run_file(folder).write_bytes(msgspec.json.encode(run))
    own_results.result_file(folder).write_bytes(msgspec.json.encode(result))
    own_results.model_file(folder, "shared").write_bytes(b"damaged")
    listed = site.ask_agent("six", "models", "list", "--json")
    assert [one["digest"] for one in json.loads(listed.stdout)["data"]] == ["d" * 64]
    for words in (("export", "latest"), ("export", "d" * 12)):
        done = site.ask_agent("six", "models", *words, str(site.folder / "six.onnx"))
        assert "the version dddddddddddd is damaged on this disk" in done.stderr
        assert "--run tabular-1" in done.stderr
    # A server keeps the version that it has.
    monkeypatch.setenv("COMMONWEIGHT_AGENT_HOME", str(site.folder / "six"))
    served = ServedModel("e" * 64, "tabular", lambda source: ())
    with contextlib.ExitStack() as stack:
        loader = serve._Loader(LATEST, Use.RECOMMENDED, "", site.folder, stack)
        assert loader.load_newer(served) is None
    assert "the version dddddddddddd is damaged on this disk" in capsys.readouterr().err


def test_id_and_paths(site: Fleet) -> None:
    site.join("three")
    peers = {peer["name"]: peer["peer"] for peer in site.data("peers", "list")}
    assert site.ask_agent("three", "id").stdout.strip() == peers["three"]
    paths = json.loads(site.ask_agent("three", "paths", "--json").stdout)["data"]
    home = str(site.folder / "three")
    assert paths["home"] == home
    assert paths["log"] == os.path.join(home, logs.FILE)


def test_a_paused_agent_goes_on_and_finishes(site: Fleet) -> None:
    site.join("four")
    assert site.ask_agent("four", "finish").returncode == 5
    site.start("four")
    assert site.ask_agent("four", "pause", "--for", "soon").returncode == 2
    assert site.ask_agent("four", "pause").returncode == 0
    site.until_agent("four", "pauses", lambda told: told["state"] == "paused")
    assert site.ask_agent("four", "resume").returncode == 0
    site.until_agent("four", "goes on", lambda told: told["state"] == "idle")
    assert site.ask_agent("four", "finish").returncode == 0
    assert site.programs["four"].wait(30) == 0


def test_a_mode_for_a_while_is_told_in_a_sentence(agent_home: Path) -> None:
    for words, told in (("2", "2 s"), ("90m", "90 min"), ("2h", "2 h"), ("0.5m", "30 s")):
        _, _, said = agent(agent_home, "policy", "set", "busy", "never", "--for", words)
        assert said == f"busy is never for the next {told}\n"
