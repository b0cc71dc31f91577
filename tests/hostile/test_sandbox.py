"""A task that attacks its owner's machine from inside the trainer: the sandbox refuses."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.policy import sandbox
from agent.policy.file_access import SandboxRules, all_rules
from agent.setup.doctor import examine_agent
from protocols.errors import TrainerFailed
from protocols.local import homes
from tests.support.hostile_task import Owner, own

pytestmark = pytest.mark.attack("20.sandbox")

LACKS = sandbox.support().lacks()
enforced = pytest.mark.skipif(bool(LACKS), reason=f"this machine lacks {' and '.join(LACKS)}")

#: Of x86_64.
CALLS = {
    "io_uring": "call(425, 8, 0)",
    "ptrace": "call(101, 16, os.getppid(), 0, 0)",
    "memory of the agent": "call(310, os.getppid(), 0, 0, 0, 0, 0)",
    "pidfd": "call(434, os.getppid(), 0)",
    "new user namespace": "call(272, 0x10000000)",
    "fork into new namespace": "call(56, 0x50000011, 0, 0, 0, 0)",
    "keys": "call(250, 0, -3, 0)",
    "child of the agent": "call(56, 0x8011, 0, 0, 0, 0) or os._exit(0)",
    "socket of the 32-bit x32 interface": "call(0x40000029, 2, 1, 0)",
}
ATTACKS = {
    "tcp": "socket.create_connection(('127.0.0.1', PORT), 5)",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "ipv6": "socket.socket(socket.AF_INET6)",
    "listen": "socket.create_server(('127.0.0.1', 0))",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "unix": "socket.socket(socket.AF_UNIX).connect(UNIX)",
    "abstract unix": "socket.socket(socket.AF_UNIX).connect(chr(0) + 'x')",
    "datagram pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', UNIX)",
    "wrapped": "import urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{PORT}', None, 3)",
    "fork": "pid = os.fork() or os._exit(TRY(lambda: socket.socket()));"
    "OUGHT(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0)",
    "new session": "pid = os.fork() or os._exit(TRY(os.setsid));"
    "OUGHT(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0)",
    "new process group": "pid = os.fork() or os._exit(TRY(lambda: os.setpgid(0, 0)));"
    "OUGHT(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0)",
    "new session by Popen": "subprocess.Popen([sys.executable, '-c', ''], start_new_session=True)",
    "python": "subprocess.run([sys.executable, '-c', 'import socket; socket.socket()'], "
    "check=True)",
    "thread": "found = []; t = threading.Thread(target=lambda: found.append("
    "TRY(lambda: socket.socket()))); t.start(); t.join(); OUGHT(found == [0])",
    "ssh key": "open(HOME / '.ssh' / 'id_ed25519').read()",
    "accounts": "open('/etc/passwd').read()",
    "shadow": "open('/etc/shadow').read()",
    "agent's key": "open(HOME / 'agent' / 'sign.key').read()",
    "list the home": "os.listdir(HOME)",
    "link to a key": "os.symlink(HOME / 'agent' / 'sign.key', 'update')",
    "hard link to a key": "os.link(HOME / 'agent' / 'sign.key', 'update')",
    "pipe for the agent": "os.mkfifo('update')",
    "past the folder": "open('../agent/sign.key').read()",
    "by descriptor": "open(f'/proc/self/cwd/../agent/sign.key').read()",
    "root of another": "open(f'/proc/{os.getppid()}/root/etc/hostname').read()",
    "environment of the agent": "open(f'/proc/{os.getppid()}/environ').read()",
    "password of another program": "OUGHT('hunter2' not in repr(os.environ))",
    "the same, by the kernel": "OUGHT('hunter2' not in open('/proc/self/environ').read())",
    "command of the agent": "open(f'/proc/{os.getppid()}/cmdline').read()",
    "shared memory names": "os.listdir('/dev/shm')",
    "terminal": "os.open('/dev/tty', os.O_RDONLY)",
    "write outside": "open(HOME / 'x', 'w')",
    "write its data": "open(HOME / 'data.csv', 'a')",
    "truncate": "os.truncate(HOME / 'agent' / 'sign.key', 0)",
    "delete": "os.unlink(HOME / 'agent' / 'sign.key')",
    "rename": "os.rename(HOME / 'agent' / 'sign.key', 'x')",
    "move out": "open('x', 'w').close(); os.rename('x', HOME / 'x')",
    "mode": "os.chmod(HOME / 'agent' / 'sign.key', 0o666)",
    "temporary": "open('/tmp/of a hostile task', 'w')",
    "shell": "subprocess.run(['sh', '-c', 'true'])",
    "shell by path": "subprocess.run(['/bin/sh', '-c', 'true'])",
    "program of its own": "shutil.copyfile('/bin/sh', 'sh'); os.execv('./sh', ['sh'])",
    "cpu limit of the agent": "import resource; "
    "resource.prlimit(os.getppid(), resource.RLIMIT_CPU)",
    "lift it": "import agent.policy.system_calls as s; s.call(446, 0, 0); "
    "open(HOME / 'agent' / 'sign.key')",
    **(CALLS if os.uname().machine == "x86_64" else {}),
}
#: Variables that an owner's account may have.
LOGINS = (
    *("PATIENTS_PASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "https_proxy", "DATABASE_URL"),
    *("AZURE_STORAGE_ACCOUNT_KEY", "GOOGLE_SERVICE_ACCOUNT_KEY", "AZURE_STORAGE_CONNECTION_STRING"),
)
#: Another error tells of these: EXDEV, or that of a child process.
QUIET = {"python", "hard link to a key", "rename", "move out"}


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    folder = tmp_path_factory.mktemp("owner")
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(folder / "s"))
    unix.listen()
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        unix,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in LOGINS:
            patch.setenv(name, "hunter2")
        prelude = f"PORT, UNIX = {tcp.getsockname()[1]}, {str(folder / 's')!r}"
        made = own(folder, "require", prelude)
        yield made
        made.trainer.stop()


@enforced
@pytest.mark.attack("20.sandbox")
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_from_a_task_fail(owner: Owner, name: str) -> None:
    """Attack: a task reaches for the network, the owner's files, keys, programs and processes."""
    with pytest.raises(TrainerFailed) as refused:
        owner.run(ATTACKS[name])
    if name in QUIET:
        return
    assert refused.value.kind == sandbox.KIND, refused.value
    assert "sandbox refused" in refused.value.message
    assert "policy set sandbox_read PATH" in refused.value.hint
    assert (owner.folder / "agent" / "sign.key").read_text() == "secret"


@enforced
@pytest.mark.attack("20.sandbox")
def test_a_task_reads_no_login_beside_a_reader_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: a task reads the password with which its helper reads the owner's table."""
    monkeypatch.setenv("PATIENTS_PASSWORD", "hunter2")
    made = own(tmp_path, "require", data_reader="dask:tcp://127.0.0.1:1")
    try:
        for where in ("repr(os.environ)", "open('/proc/self/environ').read()"):
            with pytest.raises(TrainerFailed, match="sandbox refused"):
                made.run(f"OUGHT('hunter2' not in {where})")
    finally:
        made.trainer.stop()


def test_a_home_on_the_path_of_modules_stays_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: a task reads keys in the owner's home, as the home is in PYTHONPATH."""
    home = tmp_path / "anna"
    for folder in (".ssh", "papers", "tools"):
        (home / folder).mkdir(parents=True)
    (home / "tools" / "__init__.py").touch()
    (home / "mine.py").touch()
    monkeypatch.setenv("HOME", str(home))
    for path in (home, tmp_path):
        monkeypatch.syspath_prepend(path)
    allowed = dict(all_rules(SandboxRules()))
    ours = {path: access for path, access in allowed.items() if path.startswith(str(tmp_path))}
    assert ours.pop(str(home / ".keras" / "keras.json")) == "read"
    assert ours == {
        str(tmp_path): "list",
        str(home): "list",
        str(home / "mine.py"): "read",
        str(home / "tools"): "read",
    }


@enforced
@pytest.mark.attack("20.sandbox")
@pytest.mark.skipif(sandbox.support().landlock < 6, reason="Landlock 6 (Linux 6.12) limits signals")
def test_no_signal_reaches_the_agent(owner: Owner) -> None:
    """Attack: a task kills the agent. Signal 0 asks only whether it could."""
    with pytest.raises(TrainerFailed, match="sandbox refused"):
        owner.run("os.kill(os.getppid(), 0)")


@enforced
def test_honest_work_goes_on(owner: Owner) -> None:
    """Control: temporary files, worker processes and a DataLoader's workers work in the sandbox."""
    owner.run("tempfile.NamedTemporaryFile().write(b'x'); open('result', 'w').write('x')")
    owner.run("os.kill(os.getpid(), 0); socket.socketpair()[0].close()")
    owner.run(
        "import multiprocessing\n"
        "with multiprocessing.get_context('fork').Pool(1) as pool:\n"
        "    assert pool.map(abs, [-1]) == [1]"
    )
    owner.run("import multiprocessing as m; m.get_context('fork').Queue().put(1)")
    owner.run(
        "import torch\n"
        "from torch.utils.data import DataLoader\n"
        "rows = [(torch.full((2,), n, dtype=torch.bfloat16), torch.tensor(n)) for n in range(4)]\n"
        "made = list(DataLoader(rows, batch_size=2, num_workers=1, timeout=30))\n"
        "assert made[1][0].tolist() == [[2, 2], [3, 3]] and made[1][1].tolist() == [2, 3]\n"
        "assert made[0][0].dtype == torch.bfloat16 and (made[0][0] @ made[1][0].T).shape == (2, 2)"
    )


@enforced
def test_the_owner_replaces_the_data(owner: Owner) -> None:
    """Control: a file that replaces the data while the trainer runs is readable too."""
    owner.run("assert open(HOME / 'data.csv').read() == 'a\\n1\\n'")
    (owner.folder / "new.csv").write_text("a\n2\n")
    (owner.folder / "new.csv").rename(owner.folder / "data.csv")
    owner.run("assert open(HOME / 'data.csv').read() == 'a\\n2\\n'")


@enforced
def test_an_owner_allows_a_path(tmp_path: Path) -> None:
    """Control: what `sandbox_read` names can be read and run, and not written."""
    allowed = tmp_path / "more"
    allowed.mkdir()
    (allowed / "file").write_text("words")
    made = own(tmp_path / "home", "auto", sandbox_read=(str(allowed), "/usr/bin", "/bin"))
    try:
        made.run(f"assert open({str(allowed / 'file')!r}).read() == 'words'")
        made.run("subprocess.run(['sh', '-c', 'true'], check=True)")
        with pytest.raises(TrainerFailed, match="sandbox refused"):
            made.run(f"open({str(allowed / 'file')!r}, 'w')")
    finally:
        made.trainer.stop()


def test_off_means_off(tmp_path: Path) -> None:
    """Control: without the sandbox these attacks work, so the tests above show something."""
    made = own(tmp_path, "off")
    try:
        made.run("assert open(HOME / 'agent' / 'sign.key').read() == 'secret'")
        made.run("socket.socket().close(); subprocess.run([sys.executable, '-c', ''], check=True)")
    finally:
        made.trainer.stop()


def test_require_trains_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a machine without Landlock trains with `auto`, not with `require`."""
    monkeypatch.setattr(sandbox, "support", lambda: sandbox.Support(0, True))
    made = own(tmp_path, "require")
    with pytest.raises(TrainerFailed, match="this machine lacks") as refused:
        made.run("")
    assert refused.value.kind == sandbox.KIND
    assert "policy set sandbox auto" in refused.value.hint
    assert not made.trainer.running


@pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are of Linux")
def test_the_doctors_words() -> None:
    """Control: `doctor` tells what holds, what is missing, and what to do."""
    whole = sandbox.describe("auto", sandbox.Support(6, True))
    assert whole[1] == ""
    assert "no network" in whole[0]
    assert "no signals" in whole[0]
    older = sandbox.describe("require", sandbox.Support(3, True))
    assert older[1] == ""
    assert "no signals" not in older[0]
    for found, words in [
        (sandbox.Support(2, True), "lacks Landlock 3 (Linux 6.2"),
        (sandbox.Support(6, False), "lacks seccomp filters"),
        (sandbox.Support(0, False), "can use this account's files and network"),
    ]:
        detail, fix = sandbox.describe("auto", found)
        assert words in detail
        assert "tasks that you trust" in fix
        detail, fix = sandbox.describe("require", found)
        assert "nothing is trained" in detail
        assert "sandbox auto" in fix
    detail, fix = sandbox.describe("off", sandbox.Support(6, True))
    assert detail.startswith("off")
    assert "sandbox auto" in fix


def test_doctor_has_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: `doctor` shows the sandbox of this machine."""
    monkeypatch.setenv("COMMONWEIGHT_AGENT_HOME", str(tmp_path))
    homes.open_home("agent", create=True)
    (tmp_path / "settings.toml").write_text('sandbox = "off"\n')
    line = next(check for check in examine_agent(tmp_path) if check.name == "sandbox")
    assert "off: tasks can use" in line.detail
    assert "sandbox auto" in line.fix
    (tmp_path / "settings.toml").write_text(f'data = "{tmp_path.parent}"\n')
    line = next(check for check in examine_agent(tmp_path) if check.name == "sandbox")
    assert "contains the agent's keys" in line.detail
