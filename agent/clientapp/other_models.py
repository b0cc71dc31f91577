"""The versions of a run's other models, which the agent keeps for a blend until the run has ended.

A run of tables may train several models, one after the other. The agent trained each from a version
of it that it has downloaded, and keeps the last of these; so a blend costs no download.
"""

from __future__ import annotations

import logging
from pathlib import Path

from agent.home import own_results
from agent.home.own_results import OwnModel, OwnRun
from protocols.errors import DiskFull, Refused
from protocols.local.atomic_files import write_private
from protocols.local.disk_space import check_room
from protocols.local.safe_paths import path_in
from protocols.tables.model_scores import kind_of

log = logging.getLogger("commonweight.agent")

#: Models of a run whose settings are remembered.
_MAX_MODELS = 8
#: A larger version is not kept.
MAX_BYTES = 64 * 1024 * 1024
#: What is left of the disk for the work of the run, which goes before a blend.
_SPARE_BYTES = MAX_BYTES


def earlier(before: OwnRun | None, begun: int) -> tuple[OwnModel, ...]:
    """The models that a run has trained before the one with first weights of this
    number."""
    if before is None:
        return ()
    return tuple(one for one in before.models if one.begun < begun)[-_MAX_MODELS:]


def keep(home: Path, run: OwnRun, base: str) -> None:
    """Keep the version that the run's present model was trained from last, before the cache drops
    it. `base`: its digest; empty if it is not known, such as after a restart."""
    if not base or not kind_of(run.task, run.settings):
        return
    try:
        version = path_in(home / "cache", base, ".safetensors")
        if (nbytes := version.stat().st_size) <= MAX_BYTES:
            check_room(home, nbytes + _SPARE_BYTES)
            target = own_results.other_file(own_results.folder_of(home, run.run), run.begun)
            write_private(target, version.read_bytes(), synced=False)
    except (OSError, DiskFull, Refused) as err:
        why = err.strerror if isinstance(err, OSError) else err.message
        log.info("run %s: a blend will be without a model: %s", run.run, why)


def drop(home: Path, run: OwnRun) -> None:
    """Delete what was kept."""
    folder = own_results.folder_of(home, run.run)
    for model in run.models:
        own_results.other_file(folder, model.begun).unlink(missing_ok=True)


def of_run(home: Path, run: OwnRun, number: int) -> list[tuple[str, str]]:
    """The files of the models to which the version of this number does not belong, with their
    kinds."""
    folder, shared = own_results.folder_of(home, run.run), run.model_of(number)
    of = [(own_results.other_file(folder, one.begun), one) for one in run.models]
    return [
        (str(file), str(one.settings.get("model", "")))
        for file, one in of
        if one != shared and file.exists()
    ]
