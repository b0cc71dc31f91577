"""Nothing from the wire is code, and nothing secret lies about: argv, logs, ledger, file modes."""

from __future__ import annotations

import ast
import base64
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from agent.home import enrollment_file
from protocols.enrollment import tickets
from tests.hostile.tools import files_in
from tests.support.fleet_harness import ALLOW, ROOT, Fleet, descendants, fleet
from tests.support.waiting import wait_for

pytestmark = pytest.mark.attack("20.secrets")

OURS = ("agent", "coordinator", "protocols")
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "input"}
FORBIDDEN_ATTRIBUTES = {
    ("os", "system"),
    ("os", "popen"),
    ("yaml", "load"),
    ("subprocess", "getoutput"),
    ("subprocess", "getstatusoutput"),
    ("pandas", "read_pickle"),
    ("joblib", "load"),
}
#: Calls that are safe with one value of one option.
SAFE_WITH = {
    ("torch", "load"): ("weights_only", True),
    ("np", "load"): ("allow_pickle", False),
    ("numpy", "load"): ("allow_pickle", False),
}


def sources() -> Iterator[Path]:
    for package in OURS:
        yield from sorted((ROOT / package).rglob("*.py"))


def dangers(path: Path) -> list[str]:
    """What in this file could turn bytes into code, by line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if FORBIDDEN_MODULES & {name.partition(".")[0] for name in names}:
                found.append(f"{where} imports {names}")
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in FORBIDDEN_CALLS:
            found.append(f"{where} calls {called.id}")
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            if (called.value.id, called.attr) in FORBIDDEN_ATTRIBUTES:
                found.append(f"{where} calls {called.value.id}.{called.attr}")
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            for (module, attribute), (option, value) in SAFE_WITH.items():
                safe = given.get(option)
                if (called.value.id, called.attr) == (module, attribute) and not (
                    isinstance(safe, ast.Constant) and safe.value is value
                ):
                    found.append(f"{where} calls {module}.{attribute} without {option}={value}")
        for keyword in node.keywords:
            if keyword.arg == "shell":
                found.append(f"{where} gives shell=")
    return found


@pytest.mark.attack("20.secrets", by="stranger")
def test_no_bytes_become_code() -> None:
    """Attack: send bytes that a decoder would run as code (pickle, eval and the like)."""
    files = list(sources())
    assert len(files) > 50
    # Reads a pickle of an installed package, not of the wire, in a process that holds nothing else.
    apart = {"agent/tasks/demo/motion_download.py"}
    assert apart <= {str(path.relative_to(ROOT)) for path in files}
    found = [d for path in files if str(path.relative_to(ROOT)) not in apart for d in dangers(path)]
    assert found == []


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    """Control: the search for dangerous decoders finds each of them in a bad file."""
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import pickle\nfrom yaml import load\nimport torch, os, subprocess\n"
        "eval('1')\nexec('')\ntorch.load('x')\ntorch.load('x', weights_only=False)\n"
        "os.system('x')\nsubprocess.run('x', shell=True)\nnp.load('x', allow_pickle=True)\n"
    )
    global ROOT
    saved, ROOT = ROOT, tmp_path
    try:
        assert len(dangers(bad)) == 9
    finally:
        ROOT = saved


# --- a fleet that has worked ------------------------------------------------------------------


class Worked:
    """A coordinator and two agents that have done a run, what they said, and their secrets."""

    def __init__(self, site: Fleet) -> None:
        self.site = site
        site.up()
        self.lines: set[str] = set()
        self.arguments: set[str] = set()
        ticket = site.data("ticket", "create", "--uses", "2")["ticket"]
        for name in ("ada", "bob"):
            done = site.ask_agent(name, "join", "-", "--name", name, *ALLOW, given=ticket)
            assert done.returncode == 0
            self.lines.add(done.stdout + done.stderr)
        site.start("ada", "bob")
        run = site.start_run("mnist", "--rounds", "1", "--quorum", "2", "--set", "max_steps=2")

        def ended() -> bool:
            self._note_arguments()
            return site.run(run)["state"] == "finished"

        wait_for(ended, "the run ended", within_s=100)
        for words in (
            ("status",),
            ("peers", "list"),
            ("ticket", "list"),
            ("run", "show", run),
            ("audit",),
            ("doctor",),
            ("status", "--json"),
            ("peers", "remove", "bob", "--yes"),
        ):
            done = site.ask(*words)
            self.lines.add(done.stdout + done.stderr)
        for words in (("status",), ("id",), ("paths",), ("doctor",), ("status", "--json")):
            done = site.ask_agent("ada", *words)
            self.lines.add(done.stdout + done.stderr)
        self._note_arguments()
        found = tickets.decode(ticket)
        enrollment = enrollment_file.read_enrollment(site.folder / "ada")
        self.password = enrollment.mqtt.password
        assert enrollment.mqtt.user == enrollment.peer
        gate = json.loads((site.home / "broker" / "gate.json").read_bytes())
        self.inner_password: str = gate["broker_password"]
        self.ticket = {
            "the ticket": ticket.encode(),
            "its secret": found.secret,
            "its secret in hex": found.secret.hex().encode(),
            "its secret in base64": base64.b64encode(found.secret),
        }

    def _note_arguments(self) -> None:
        for program in self.site.programs.values():
            for process in [psutil.Process(program.process.pid), *descendants(program.process.pid)]:
                try:
                    self.arguments.add(" ".join(process.cmdline()))
                except psutil.Error:
                    continue

    @property
    def private_keys(self) -> dict[Path, bytes]:
        """The key files, and the base64 of what is secret in each."""
        found = {}
        for path in files_in(self.site.folder):
            data = path.read_bytes()
            if b"PRIVATE KEY" in data:
                found[path] = b"".join(data.split(b"-----")[2].split())
        return found


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worked]:
    if sys.platform == "win32":
        pytest.skip("file modes are POSIX")
    before = os.umask(0o022)  # what most shells have: nothing may depend on a better one
    try:
        with fleet(tmp_path_factory.mktemp("worked")) as site:
            yield Worked(site)
    finally:
        os.umask(before)


def homes_of(worked: Worked) -> list[Path]:
    return [worked.site.home, worked.site.folder / "ada", worked.site.folder / "bob"]


def test_only_the_owner_can_read(worked: Worked) -> None:
    """Attack: another account of the machine reads the files of a home."""
    wrong = []
    for home in homes_of(worked):
        for path in [home, *home.rglob("*")]:
            mode = path.lstat().st_mode & 0o777
            if mode & 0o077:
                wrong.append(f"{path.relative_to(worked.site.folder)} {mode:o}")
    assert wrong == []


def test_secrets_are_in_no_argument_list(worked: Worked) -> None:
    """Attack: another account reads passwords, tickets and keys in the list of processes."""
    assert len(worked.arguments) >= 4, "coordinator, broker, agents, trainers"
    keys = [body.decode() for body in worked.private_keys.values()]
    for line in worked.arguments:
        assert worked.password not in line
        assert worked.inner_password not in line
        for secret in worked.ticket.values():
            assert secret.decode("latin-1") not in line
        assert not any(key in line for key in keys)


def test_the_ticket_is_written_nowhere(worked: Worked) -> None:
    """Attack: find a used ticket in files and logs."""
    for path in files_in(worked.site.folder):
        data = path.read_bytes()
        assert [what for what, secret in worked.ticket.items() if secret in data] == [], path
    for line in worked.lines:
        for what, secret in worked.ticket.items():
            assert secret not in line.encode(), what


def test_the_mqtt_passwords_are_only_where_they_are_used(worked: Worked) -> None:
    """Attack: find MQTT passwords in other files and in logs."""

    def holders(password: str) -> set[str]:
        assert not any(password in line for line in worked.lines)
        return {
            str(path.relative_to(worked.site.folder))
            for path in files_in(worked.site.folder)
            if password.encode() in path.read_bytes()
        }

    assert holders(worked.password) == {f"ada/{enrollment_file.ENROLLMENT_FILE}"}
    inner = {"coordinator/broker/gate.json", "coordinator/broker/broker.toml"}
    assert holders(worked.inner_password) == inner


def test_private_keys_are_in_their_own_files_alone(worked: Worked) -> None:
    """Attack: find private keys outside of their own files, and in logs."""
    keys = worked.private_keys
    names = {str(path.relative_to(worked.site.folder)) for path in keys}
    assert names == {
        "coordinator/ca.key",
        "coordinator/coordinator.key",
        "coordinator/operator.key",
        "coordinator/server.key",
        *(f"{name}/{key}" for name in ("ada", "bob") for key in ("sign.key", "node.key")),
    }
    for path in files_in(worked.site.folder):
        data = b"".join(path.read_bytes().split())
        for owner, body in keys.items():
            if path != owner:
                assert body not in data, (path, owner)
                assert base64.b64decode(body)[-32:] not in data
    for line in worked.lines:
        assert "PRIVATE KEY" not in line
