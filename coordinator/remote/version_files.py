"""The file of a version: in the coordinator's home, or downloaded to this machine."""

from __future__ import annotations

from pathlib import Path

from coordinator.remote.access import ACCESS_FILE
from coordinator.remote.api_client import Remote
from coordinator.runs import export
from coordinator.runs.state import Run
from coordinator.storage.weight_store import WeightStore
from protocols.errors import BadWeights
from protocols.local.safe_paths import path_in
from protocols.model.weights import file_digest

FOLDER = "versions"
#: Downloaded versions that stay on the disk, the last used ones.
MAX_VERSIONS = 2
_SUFFIX = ".safetensors"


def find(remote: Remote, run_id: str, digest: str) -> Path:
    """The file of a version of this run, which need not exist in the coordinator's own home.

    Elsewhere it is downloaded once. Raises CommonweightError, OSError.
    """
    if not (remote.home / ACCESS_FILE).exists():
        return WeightStore(remote.home).version_path(digest)
    folder = remote.home / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    path = path_in(folder, digest, _SUFFIX)
    if not path.exists():
        part = path_in(folder, digest, ".part")
        try:
            remote.download_version(run_id, digest, part)
            if file_digest(part) != digest:
                raise BadWeights(
                    f"the coordinator sent other bytes than those of version {digest[:12]}",
                    "nothing was stored; ask its operator to check its disk",
                )
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    path.touch()
    newest_first = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda file: -file.stat().st_mtime)
    for old in newest_first[MAX_VERSIONS:]:
        old.unlink(missing_ok=True)
    return path


def export_version(remote: Remote, run: Run, which: str, out: Path) -> str:
    """Write a version and its card; return its digest. The audit says so.

    `which`: best, latest, or the start of a digest. Raises CommonweightError.
    """
    from coordinator.fleet.readings import display_name

    names = {peer.peer: display_name(peer) for peer in remote.fleet().peers.values()}
    version = export.resolve_version(run, which)
    export.check_target(out)
    remote.mark_exported(run.id, version)
    return export.export(find(remote, run.id, version), run, version, names, out)
