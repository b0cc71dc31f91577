"""Versions in an object store, through obstore (extra `cluster`): S3, GCS, Azure, a shared folder.

`versions = "s3://bucket/prefix"` keeps versions there, beside the folder of the home. A version is
in the store before the ledger names it, and a start fetches what the folder lacks. So a coordinator
on another machine has them all.

PREFIX/fleet has the id of the fleet, PREFIX/DIGEST.safetensors is one version, and
PREFIX/state-DIGEST.safetensors one state. Credentials come from the environment, the files, or the
machine, as the library of each cloud reads them.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from protocols.errors import HomeError, Refused, StoreUnreachable, UsageError
from protocols.extras import needs_extra
from protocols.local.atomic_files import fsync_folder
from protocols.local.failpoints import failpoint

log = logging.getLogger("commonweight.versions")
T = TypeVar("T")

SCHEMES = ("s3", "gs", "az", "file")
_NAME = re.compile(r"(.*)([0-9a-f]{64})\.safetensors")
#: A larger file goes in parts, of which a few are in memory.
_PART_BYTES = 8 * 1024 * 1024
_MAX_PARTS = 4
_RETRY = {"max_retries": 3, "retry_timeout": timedelta(seconds=10)}
_CLIENT = {"connect_timeout": "5s", "timeout": "60s"}


class ObjectStore:
    """Files by their SHA-256 under a URL. Changes happen one after another, in a thread.

    It belongs to `fleet` and can be written: else it raises UsageError, Refused, HomeError,
    StoreUnreachable or MissingPackage. Each call may take as long as the file.
    """

    def __init__(self, url: str, fleet: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES or not (parts.netloc or parts.scheme == "file"):
            raise UsageError(
                f"versions cannot be {url!r}",
                "write it as s3://bucket/prefix, gs://…, az://… or file:///shared/folder",
            )
        if parts.username or parts.password or parts.query:
            raise UsageError(
                "the address of the versions has a login or parameters",
                "leave them out; set AWS_ACCESS_KEY_ID and the like in the environment",
            )
        with needs_extra("cluster", "a store of versions"):
            import obstore
            from obstore.store import from_url
        self._obstore, self._url, self._prefix = obstore, url, ""
        if parts.scheme == "file" and not Path(parts.path).is_dir():
            raise HomeError(f"the folder of the versions, {parts.path}, is not there", "mount it")
        options: dict[str, Any] = {}
        if parts.scheme != "file":
            client = dict(_CLIENT)
            if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
                client["allow_http"] = "true"  # such as a server on this machine
            options = {"retry_config": _RETRY, "client_options": client}
        #: Names of deleted files that are still in the store.
        self._doomed = set[str]()
        try:
            self._store: Any = from_url(url, **options)
        except (obstore.exceptions.BaseError, ValueError) as err:
            raise UsageError(f"the store {url} cannot be opened: {_brief(err)}") from err
        self._thread = ThreadPoolExecutor(1, "versions")
        try:
            self._check(fleet)
        except BaseException:
            self._thread.shutdown()
            raise

    def _check(self, fleet: str) -> None:
        """Raise unless this fleet may write here. Nothing is changed for another one."""
        name, mine = "fleet", fleet.encode()
        found = self._read(name)
        if found is None:
            with (
                contextlib.suppress(self._obstore.exceptions.AlreadyExistsError),
                self._errors("written", at_start=True),
            ):
                self._create(name, mine)
            found = self._read(name)
        if found != mine:
            text = (found or b"?")[:80].decode(errors="replace")
            raise HomeError(
                f"the store {self._url} has the versions of another fleet, {text}",
                "give each fleet a prefix of its own",
            )
        probe = f"probe-{secrets.token_hex(8)}"  # the other object may be of an earlier start
        with self._errors("written", at_start=True):
            self._obstore.put(self._store, probe, b"")
            self._obstore.delete(self._store, probe)

    def _create(self, name: str, data: bytes) -> None:
        try:
            self._obstore.put(self._store, name, data, mode="create")
        except FileNotFoundError as err:
            raise UsageError(f"there is no bucket for {self._url}", "create it first") from err

    def _read(self, name: str) -> bytes | None:
        try:
            with self._errors("read", at_start=True):
                return bytes(self._obstore.get(self._store, name).bytes())
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def _errors(self, what: str, *, at_start: bool = False) -> Iterator[None]:
        """Raise errors of the library as ours; FileNotFoundError and AlreadyExistsError pass.

        Later, a missing right may come back, as a login that has expired: work waits for it.
        """
        known = self._obstore.exceptions
        try:
            yield
        except (known.AlreadyExistsError, FileNotFoundError):
            raise
        except (known.BaseError, OSError) as err:
            refused = known.PermissionDeniedError, known.UnauthenticatedError, PermissionError
            # The library has no error of its own for a folder that cannot be written.
            is_refused = isinstance(err, refused) or "Permission denied" in str(err)
            if not (at_start and is_refused):
                told = "start it again" if at_start else "the coordinator waits for it"
                raise StoreUnreachable(
                    f"the store {self._url} cannot be {what}: {_brief(err)}",
                    f"{told}; check the network, the bucket and the login (AWS_… in the "
                    "environment)",
                ) from err
            raise Refused(
                f"the store {self._url} cannot be {what}: {_brief(err)}",
                "give this machine the right to read, write, list and delete there",
            ) from err

    def put(self, digest: str, path: Path) -> None:
        """Store a file durably, unless the store has it. Raises StoreUnreachable."""
        self._in_order(lambda: self._put(self._name(digest), path))

    def _put(self, name: str, path: Path) -> None:
        self._doomed.discard(name)
        size = path.stat().st_size
        with self._errors("written"):
            try:
                if self._obstore.head(self._store, name)["size"] == size:
                    return
            except FileNotFoundError:
                pass
            # A part that was not completed is never seen. The bytes of a name are always the same,
            # so a second writer replaces a file by an equal one.
            self._obstore.put(
                self._store, name, path, chunk_size=_PART_BYTES, max_concurrency=_MAX_PARTS
            )
        failpoint("version.uploaded")

    def get(self, digest: str, path: Path) -> bool:
        """Fetch a file durably; False if there is none with these bytes. Raises as `put`."""
        temporary, sha = path.with_name(f".new-{secrets.token_hex(8)}"), hashlib.sha256()
        try:
            with self._errors("read"), temporary.open("xb") as file:
                stream = self._obstore.get(self._store, self._name(digest)).stream(_PART_BYTES)
                for piece in stream:
                    sha.update(piece)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            if sha.hexdigest() != digest:
                log.error("version %s in %s has other bytes: ignored", digest[:12], self._url)
                return False
            temporary.replace(path)
            fsync_folder(path.parent)
        except FileNotFoundError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def delete(self, digest: str) -> None:
        """Delete a file soon. What cannot be deleted is named in the log, and tried again later."""
        self._thread.submit(self._delete, self._name(digest))

    def _delete(self, name: str) -> None:
        self._doomed.add(name)
        for one in sorted(self._doomed):
            try:
                with self._errors("changed"), contextlib.suppress(FileNotFoundError):
                    self._obstore.delete(self._store, one)
            except StoreUnreachable as err:
                log.warning("%s was not deleted: %s", one, err)
                return
            self._doomed.discard(one)

    def digests(self) -> set[str]:
        """Which files there are. Raises StoreUnreachable."""
        with self._errors("listed"):
            names = [one["path"] for page in self._obstore.list(self._store) for one in page]
        found = filter(None, map(_NAME.fullmatch, names))
        return {name[2] for name in found if name[1] == self._prefix}

    def _name(self, digest: str) -> str:
        return f"{self._prefix}{digest}.safetensors"

    def _in_order(self, work: Callable[[], T]) -> T:
        """Do it after the deletions before it, one of which may be of the same file."""
        return self._thread.submit(work).result()

    def for_states(self) -> ObjectStore:
        """The files of strategies' states in the same store, apart from the versions."""
        states = copy.copy(self)
        states._prefix = "state-"
        return states

    def close(self) -> None:
        """Finish the deletions."""
        self._thread.shutdown()


def _brief(err: BaseException) -> str:
    """The first line of an error of the library."""
    return str(err).strip().partition("\n")[0][:300]
