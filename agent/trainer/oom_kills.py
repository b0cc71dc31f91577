"""How many processes the kernel has killed because memory ran out, and which it kills first."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/")


def oom_kills(root: Path = _ROOT) -> int | None:
    """The number of out-of-memory kills in our cgroup, or else on the whole machine.

    None if the system does not count them (not Linux).
    """
    for path in _sources(root):
        try:
            for line in path.read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
        except (OSError, ValueError):
            continue
    return None


def prefer_for_oom_kill() -> None:
    """Make Linux kill this process, not the agent, when memory runs out."""
    try:
        Path("/proc/self/oom_score_adj").write_text("500")
    except OSError:
        pass  # not Linux, or a container or the sandbox forbids it


def _sources(root: Path) -> list[Path]:
    groups = root / "sys/fs/cgroup"
    found = []
    try:
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            inner = path.strip("/")
            if not controllers:  # version 2
                found.append(groups / inner / "memory.events")
            elif "memory" in controllers.split(","):
                found.append(groups / "memory" / inner / "memory.oom_control")
    except (OSError, ValueError):
        pass
    # In a container our own group is often the root of what is mounted.
    found += [
        groups / "memory.events",
        groups / "memory/memory.oom_control",
        root / "proc/vmstat",
    ]
    return found
