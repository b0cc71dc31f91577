"""What the owner's settings let a trainer read, write and run: the rules of its sandbox."""

from __future__ import annotations

import glob
from collections.abc import Collection
from pathlib import Path

from agent.data import sources as data_sources
from agent.data.settings import is_spooled
from agent.home.settings_schema import AgentSettings
from agent.policy.file_access import SandboxRules, modules
from agent.tasks import registry
from protocols.local import failpoints


def make_rules(
    chosen: AgentSettings,
    *,
    read: Collection[Path] = (),
    write: Collection[Path],
    memory: Path | None = None,
    spool: Path | None = None,
) -> SandboxRules:
    """The rules for a trainer on the owner's data. `read` and `write` are further folders.
    `memory` remembers rows, and `spool` is the folder for a table that the trainer has no
    connection to."""
    files = (registry.split_source(source)[0] for source in chosen.task_files.values())
    folders = {file.resolve().parent for file in files}
    # Task files and what they can import beside them. Not the folder: it may be the owner's home.
    beside = [module for folder in sorted(folders) for module in modules(folder)]
    # A sheet or a table is in a file, which the process that reads it opens.
    file = data_sources.parse(chosen.data).file
    data: list[str | Path] = [path for path in (file, chosen.models) if path]
    if glob.has_magic(chosen.data) and not Path(chosen.data).exists():
        data += glob.glob(chosen.data)
        folders.add(Path(chosen.data).parent)
    spooled = spool if spool and is_spooled(chosen.data, chosen.data_reader) else None
    data += [spooled] if spooled else []
    return SandboxRules(
        mode=chosen.sandbox,
        read=(*map(absolute, (*data, *read)), *beside),
        allowed=tuple(map(absolute, chosen.sandbox_read)),
        listed=tuple(map(str, sorted(folders))),
        write=tuple(map(absolute, (*write, *failpoints.folders()))),
        compile=chosen.compile,
        memory=absolute(memory) if memory else "",
        min_count=chosen.data_min_count,
        table=chosen.data if spooled else "",
        reader=chosen.data_reader if spooled else "",
        spool=absolute(spooled) if spooled else "",
    )


def absolute(path: str | Path) -> str:
    """The path as rules have it, with the home folder in place of ~."""
    return str(Path(path).expanduser().absolute())
