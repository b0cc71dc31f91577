"""What `deploy/` promises: pinned packages, a pinned image, bounded services, a working script."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from coordinator.strategies import memory_estimate

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
DIRECT = {
    "coordinator": PROJECT["project"]["dependencies"],
    "cluster": [*PROJECT["project"]["dependencies"], *EXTRAS["cluster"]],
    "agent": [*PROJECT["project"]["dependencies"], *EXTRAS["agent"], *EXTRAS["tabular"]],
    "build": PROJECT["build-system"]["requires"],
}
_PIN = re.compile(r"^([\w.-]+)==([^ ;\\]+)(?: ; ([^\\]+))? \\$")


def pins(role: str) -> dict[str, str]:
    """Package to version in a lock; every line that is no pin has to be a hash of the one above."""
    found: dict[str, str] = {}
    hashes: dict[str, int] = {}
    name = ""
    for line in (DEPLOY / "locks" / f"{role}.txt").read_text().splitlines():
        if pin := _PIN.match(line):
            name = canonicalize_name(pin[1])
            found[name], hashes[name] = pin[2], 0
        else:
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
            hashes[name] += 1
    assert all(hashes.values())
    return found


@pytest.mark.parametrize("role", DIRECT)
def test_a_lock_has_every_package_that_we_ask_for_in_a_version_that_we_allow(role: str) -> None:
    locked = pins(role)
    for requirement in map(Requirement, DIRECT[role]):
        name = canonicalize_name(requirement.name)
        if name != "commonweight":
            assert requirement.specifier.contains(locked[name]), requirement


@pytest.mark.attack("20.provenance")
def test_the_container_starts_from_a_digest_and_installs_by_hash() -> None:
    """Attack: put another base image or package into the container than those that were tested."""
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    images = [line.split()[1] for line in lines if line.startswith("FROM ")]
    stages = {line.split()[-1] for line in lines if line.startswith("FROM ")}
    outside = [image for image in images if image not in stages]
    assert outside
    assert all(re.search(r"@sha256:[0-9a-f]{64}$", image) for image in outside)
    installs = [line for line in lines if "install" in line and line.startswith("RUN")]
    assert installs == [
        "RUN sh deploy/install.sh coordinator /opt/commonweight --bin ''",
        "RUN sh deploy/install.sh coordinator /opt/commonweight --bin '' --cluster",
        "RUN sh deploy/install.sh agent /opt/commonweight --bin '' --torch \"$TORCH\"",
    ]
    assert "ARG TORCH=cuda" in lines  # PyTorch by hash too, unless the one who builds says cpu
    assert "--require-hashes" in (DEPLOY / "install.sh").read_text()


UNITS = ["commonweight.service", "commonweight-agent.service", "commonweight-mosquitto.service"]


@pytest.mark.parametrize("unit", UNITS)
def test_a_service_has_a_bound_on_memory_and_on_processes(unit: str) -> None:
    settings = dict(
        line.split("=", 1)
        for line in (DEPLOY / unit).read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )
    assert settings["MemoryMax"] == "75%"
    assert int(settings["TasksMax"]) > 0
    # The agent reads from /proc how busy the machine is; the coordinator needs none of it.
    assert ("ProcSubset" in settings) == (unit != "commonweight-agent.service")


def test_memory_is_estimated_where_the_service_hides_proc_meminfo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hidden() -> None:
        raise FileNotFoundError("/proc/meminfo")

    assert memory_estimate._memory_bytes()[1] == "free"
    monkeypatch.setattr(psutil, "virtual_memory", hidden)
    size_bytes, kind = memory_estimate._memory_bytes()
    assert kind == "installed"
    assert size_bytes > 1e8


def test_the_compose_file_keeps_secrets_out_and_bounds_each_service() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert re.fullmatch(r"\d+g", service["mem_limit"]), name
        for key, value in service["environment"].items():
            is_secret = "PASSWORD" in key or "SECRET" in key
            assert not is_secret or re.fullmatch(
                r"\$\{[A-Z]+_PASSWORD:\?\}|\$\{MQTT_PASSWORD:-\}", value
            )
    grafana = compose["services"]["grafana"]
    assert grafana["ports"] == ["127.0.0.1:3000:3000"]
    for name in ("one", "two"):
        service, port = compose["services"][name], compose["services"][name]["environment"]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert f":{port['COMMONWEIGHT_PORT']}" in port["COMMONWEIGHT_PUBLIC_ADDRESSES"]
        downloads = port["COMMONWEIGHT_DOWNLOAD_PORT"]
        assert f":{downloads}" in port["COMMONWEIGHT_DOWNLOAD_ADDRESSES"]
        assert f"{downloads}:{downloads}" in service["ports"]
        metrics = port["COMMONWEIGHT_METRICS_PORT"]
        assert f"{name}:{metrics}" in (DEPLOY / "monitoring" / "prometheus.yml").read_text()
        assert not any(metrics in published for published in service["ports"])
    mounted = (*compose["services"]["prometheus"]["volumes"], *grafana["volumes"])
    files = [words.split(":")[0] for words in mounted if words.startswith(".")]
    assert len(files) == 4
    for file in files:
        assert (DEPLOY / file).exists(), file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "coordinator|agent"),
        (["server"], "coordinator|agent"),
        (["agent", "--torch", "gpu"], "--torch is cpu or cuda, not gpu"),
        (["agent", "--torch"], "--torch needs a value"),
        (["agent", "--cluster"], "--cluster is for a coordinator"),
        (["agent", "--root"], "there is no option --root"),
    ],
)
def test_the_install_script_says_how_it_is_used(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        ["sh", str(DEPLOY / "install.sh"), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr


def _dry_run(folder: Path, *arguments: str, uv: bool) -> list[str]:
    """The commands that the script would run, in an empty home, with or without uv on the path."""
    programs = folder / "programs"
    programs.mkdir()
    needed = ("sh", "dirname", "uname", "mktemp", "sed", "awk", "rm", "cat", "readlink")
    for name in needed:
        (programs / name).symlink_to(shutil.which(name) or name)
    (programs / "python3").symlink_to(sys.executable)
    if uv:  # a dry run starts nothing
        (programs / "uv").write_text("#!/bin/sh\nexit 1\n")
        (programs / "uv").chmod(0o700)
    home = folder / "home"
    home.mkdir()
    done = subprocess.run(
        [programs / "sh", DEPLOY / "install.sh", *arguments, "--dry-run"],
        env={"PATH": str(programs), "HOME": str(home), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "nothing was changed" in done.stdout
    assert list(home.iterdir()) == []
    return [line.removeprefix("+ ") for line in done.stdout.splitlines() if line[:2] == "+ "]


@pytest.mark.parametrize("uv", [True, False])
def test_a_dry_run_of_the_install_script_says_what_it_would_do(tmp_path: Path, uv: bool) -> None:
    steps = _dry_run(tmp_path, "coordinator", "--service", uv=uv)
    home = tmp_path / "home"
    assert all(line.startswith("uv ") for line in steps[:5]) is uv
    (packages,) = [line for line in steps if "coordinator.txt" in line]
    assert "--require-hashes --only-binary :all:" in packages
    links = [line for line in steps if line.startswith("ln ")]
    assert links == [
        f"ln -sf {home}/commonweight/bin/{name} {home}/.local/bin/{name}"
        for name in ("commonweight", "commonweight-agent")
    ]
    assert f"write {home}/.config/systemd/user/commonweight.service" in steps
    assert "systemctl --user enable --now commonweight.service" in steps
    assert not any("sudo" in line for line in steps)


def test_the_install_script_adds_the_packages_of_a_replica(tmp_path: Path) -> None:
    steps = _dry_run(tmp_path, "coordinator", "--cluster", uv=False)
    (packages,) = [line for line in steps if "cluster.txt" in line]
    assert "--require-hashes --only-binary :all:" in packages
    assert pins("coordinator").items() <= pins("cluster").items(), "and no other version"


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has CUDA on Linux only")
def test_the_install_script_takes_pytorch_without_cuda_only_if_asked(tmp_path: Path) -> None:
    for torch in ("cuda", "cpu"):
        (tmp_path / torch).mkdir()
        steps = _dry_run(tmp_path / torch, "agent", "--torch", torch, uv=False)
        own = [line for line in steps if "torch==" in line]
        assert [f"torch=={pins('agent')['torch']}" in line for line in own] == (
            [True] if torch == "cpu" else []
        )
        assert any("locks/agent.txt" in line for line in steps) is (torch == "cuda")


@pytest.mark.long
def test_the_install_script_makes_a_working_coordinator(tmp_path: Path) -> None:
    done = _install(ROOT, tmp_path / "here", "--bin", str(tmp_path / "bin"))
    assert done.returncode == 0, done.stderr
    told = subprocess.run(
        [tmp_path / "bin/commonweight", "--version"], capture_output=True, text=True
    )
    assert told.stdout.strip() == PROJECT["project"]["version"]


@pytest.mark.long
@pytest.mark.attack("20.provenance")
def test_the_install_script_refuses_a_package_with_another_hash(tmp_path: Path) -> None:
    """Attack: the package index hands out another file under the same name and version."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("deploy", "agent", "commonweight", "coordinator", "protocols"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    lock = copy / "deploy/locks/coordinator.txt"
    # aiomqtt is the first package; its hashes are those of other files now.
    first, rest = lock.read_text().split("\nalembic==", 1)
    lock.write_text(re.sub("sha256:.{8}", "sha256:00000000", first) + "\nalembic==" + rest)
    done = _install(copy, tmp_path / "here", "--bin", "")
    assert done.returncode != 0
    # pip's words, or uv's
    assert re.search("DO NOT MATCH THE HASHES|Hash mismatch", done.stderr)
    assert not (tmp_path / "here/bin/commonweight").exists()


def _install(source: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(source / "deploy/install.sh"), "coordinator", str(folder), *options],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=170,
    )
