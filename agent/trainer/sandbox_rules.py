"""What the owner's settings let a trainer read, write and run: the rules of its sandbox."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from agent.home.settings import AgentSettings
from agent.policy import sandbox
from agent.policy.file_access import SandboxRules
from agent.tasks import registry
from protocols import failpoints


def make_rules(
    chosen: AgentSettings,
    *,
    read: Collection[Path] = (),
    write: Collection[Path],
    sources: Collection[str] = (),
    memory: Path | None = None,
) -> SandboxRules:
    """The rules for a trainer on the owner's data. `read` and `write` are further folders;
    `sources` are task files beside the registered ones. `memory` remembers rows."""
    files = [*chosen.task_files.values(), *filter(None, sources)]
    folders = {registry.split_source(source)[0].resolve().parent for source in files}
    modules = [module for folder in sorted(folders) for module in _modules(folder)]
    data: list[str | Path] = [path for path in (chosen.data, chosen.models) if path]
    return SandboxRules(
        mode=chosen.sandbox,
        read=(*map(_absolute, (*data, *read)), *modules),
        allowed=tuple(map(_absolute, chosen.sandbox_read)),
        listed=tuple(map(str, sorted(folders))),
        write=tuple(map(_absolute, (*write, *failpoints.folders()))),
        compile=chosen.compile,
        network=sandbox.uses_network(chosen.data_reader),
        memory=_absolute(memory) if memory else "",
        min_count=chosen.data_min_count,
    )


def _modules(folder: Path) -> Iterator[str]:
    """Task files and what they can import beside them. Not the folder: it may be the owner's home
    with much else in it."""
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return
    for path in found:
        is_package = path.is_dir() and not path.is_symlink() and (path / "__init__.py").is_file()
        if is_package or (path.suffix in (".py", ".so") and path.is_file()):
            yield str(path)


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().absolute())
