"""Messages of Flower apps on the agent: a signed message in, a signed answer out, each done once.

The owner has installed the app: a message names it by the digest of its code, and brings none. The
last answer of each run stays here with what the app kept in its context, and both count together: a
message that is sent again gets the same answer, and one that was interrupted begins from the
context before it. Blocking, for the work thread.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import msgspec
from flwr.app import ConfigRecord, Message, RecordDict
from msgspec import Struct

from agent.clientapp.interfaces import PeerIdentity, signed_payload
from agent.clientapp.owner_rules import OwnerRules
from agent.home.settings_schema import AgentSettings
from agent.tasks.work import Done, RunApp
from protocols.errors import BadMessage, NotAllowed, TrainerFailed, UsageError
from protocols.local import flower_apps, own_folders
from protocols.local.atomic_files import fsync_files, read_json, write_private
from protocols.local.disk_space import check_room
from protocols.local.failpoints import failpoint, note
from protocols.local.flower_apps import PREFIX, InstalledApp
from protocols.local.own_folders import OwnFolder
from protocols.local.safe_paths import path_in
from protocols.messages import app_work
from protocols.messages.app_work import (
    RECORD,
    SIGNED_APP_ANSWER,
    SIGNED_APP_WORK,
    AppAnswer,
    AppWork,
)
from protocols.messages.fleet_names import FleetNames
from protocols.messages.jobs import idempotency_key
from protocols.messages.work import Work, WorkKind
from protocols.model.weights import file_digest

log = logging.getLogger("commonweight.agent")

#: Runs whose last answers, and contexts, are kept.
MAX_RUNS = 8
#: Limits of the owner that have no effect in an app. One that is stricter than its default refuses.
_NOT_KEPT = ("min_cohort", "min_witnesses", "data_min_rows")
#: In an app's folder: what belongs to its runs.
_RUNS, _ARRAYS = "runs", ".safetensors"
_SPARE_BYTES = 4 * 1024 * 1024
#: Failures of an app's process that another process may not repeat.
_RETRYABLE = frozenset({"killed", "died", "start"})


class AppProcess(Protocol):
    """Runs apps. `agent.trainer.app_trainer` has the implementation."""

    def folder_of(self, name: str) -> Path: ...

    def pass_on(self, name: str, app: InstalledApp, work: RunApp, within_s: float) -> Done: ...

    def stop(self) -> None: ...


class _Stored(Struct, frozen=True, kw_only=True):
    """The last answer of a run. `state`: the name of the file with the app's context, or ""."""

    app: str
    answer: bytes
    signature: bytes
    state: str = ""


class FlowerApps:
    """Answers messages for apps.

    `fetch(digest, nbytes)` gives the file of a version,
    `send(digest, path)` uploads one. `on_work(work | None)` is called when work begins and ends,
    `on_leaving(work, answer)` before an answer with content is sent; if it raises, none is sent.
    """

    def __init__(
        self,
        me: PeerIdentity,
        folder: Path,
        process: AppProcess,
        owner: OwnerRules,
        *,
        fetch: Callable[[str, int], Path],
        send: Callable[[str, Path], None],
        on_work: Callable[[Work | None], None] = lambda work: None,
        on_leaving: Callable[[AppWork, AppAnswer], None] = lambda work, answer: None,
    ) -> None:
        self._me, self._folder, self._process = me, folder, process
        self._settings, self._budget = owner.settings, owner.budget
        self._fetch, self._send = fetch, send
        self._on_work, self._on_leaving = on_work, on_leaving
        self._fleet_names = FleetNames(me.fleet)
        #: The key of the last answer whose file was written, or verified, by this process.
        self._verified = ""

    def answer(self, message: Message) -> RecordDict:
        """Returns the content of the reply. Raises CommonweightError."""
        payload, signature = signed_payload(message, RECORD, "work")
        work = SIGNED_APP_WORK.open(payload, signature, self._me.is_coordinators)
        self._fleet_names.check("coordinator", work.fleet)
        key = idempotency_key(payload)
        app = self._allowed(work)
        if work.kind == "check":
            return self._reply(*self._seal(work, key))
        note("app", run=work.run, number=work.number, key=key)
        self._on_work(_shown(work))
        try:
            stored = self._load(work, key) or self._do(work, key, app)
            answer = SIGNED_APP_ANSWER.decode(stored.answer)
            self._on_leaving(work, answer)
            if answer.digest:
                if not self._is_plain(work, key):
                    text = f"the answer of the app {work.app} is no plain file: it is not sent"
                    raise TrainerFailed("task", text)
                self._send(answer.digest, self._arrays(work, key))
        finally:
            self._on_work(None)
        return self._reply(stored.answer, stored.signature)

    def _allowed(self, work: AppWork) -> InstalledApp:
        """The app, if the owner lets it do this work. Raises NotAllowed, CommonweightError."""
        chosen = self._settings()
        app = chosen.apps.get(work.app)
        there = "on that machine: commonweight-agent"
        if app is None or PREFIX + work.app in chosen.forbidden_tasks:
            raise NotAllowed(
                f"its owner has not installed the Flower app {work.app!r}",
                f"{there} app add FOLDER",
            )
        if app.code != work.code:
            raise NotAllowed(
                f"its Flower app {work.app!r} has other files: code {app.code[:12]}, and the run's "
                f"has {work.code[:12]}",
                f"copy the same folder there, then {there} app add FOLDER",
            )
        try:
            is_same = flower_apps.read_card(Path(app.folder)).code == app.code
        except UsageError as err:
            log.warning("the app %s cannot be read: %s", work.app, err.message)
            is_same = False
        if not is_same:
            raise NotAllowed(
                f"the files of its Flower app {work.app!r} are not those that its owner allowed",
                f"{there} app add FOLDER",
            )
        if chosen.secure_min:
            raise NotAllowed(
                "its owner takes part in secure runs alone, and a Flower app sends single updates",
                f"{there} policy set secure_min 0",
            )
        if self._budget.has_limit:
            raise NotAllowed(
                "its owner has a privacy budget, and what a Flower app sends has no known noise",
                f"{there} policy set privacy.max_epsilon 0",
            )
        for key in _NOT_KEPT:
            if getattr(chosen, key) > (default := getattr(AgentSettings(), key)):
                raise NotAllowed(
                    f"its owner has set {key}, and a Flower app does not keep to it",
                    f"{there} policy set {key} {default}",
                )
        return app

    # --- work ---

    def _do(self, work: AppWork, key: str, app: InstalledApp) -> _Stored:
        out = self._out(work)
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_room(out, 2 * work.nbytes + _SPARE_BYTES)
        base = self._fetch(work.base, work.nbytes) if work.base else None
        last = self._last(work.run)
        state = out / last.state if last and last.state and last.app == work.app else None
        state_out = path_in(out, f"{key}.state")
        request = RunApp(
            task=PREFIX + work.app,
            settings=work.config,
            message_type=work.message_type,
            group=work.group,
            told=work.told,
            base=str(base.absolute()) if base else "",
            out=str(self._arrays(work, key).absolute()),
            state=str(state.absolute()) if state else "",
            state_out=str(state_out.absolute()),
            flower_run=work.flower_run,
            node=work.node,
            node_config=app.config,
        )
        try:
            done = self._pass_on(work, app, request)
            failpoint("agent.app.done")
            self._allowed(work)  # the owner may have removed it since
            app_work.decode_records(done.description)
            self._budget.charge_exact("training", work.run, f"{PREFIX}{work.app}, what it sends")
        except Exception:
            kept = state.name if state else "."
            self._delete(work, lambda name: key in name and not name.startswith(kept))
            raise
        has_state = state_out.is_file()
        answer, signature = self._seal(work, key, done)
        stored = _Stored(
            app=work.app,
            answer=answer,
            signature=signature,
            state=state_out.name if has_state else "",
        )
        if has_state:
            arrays = state_out.with_name(state_out.name + _ARRAYS)
            fsync_files(*filter(Path.exists, (state_out, arrays)))
        # Without state, a power cut loses only work that can be repeated.
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file, data = self._file(work.run), msgspec.json.encode(stored)
        write_private(file, data, synced=has_state)
        self._verified = key
        failpoint("agent.app.kept")
        self._drop_old(work, key)
        return stored

    def _pass_on(self, work: AppWork, app: InstalledApp, request: RunApp) -> Done:
        """Let the app answer; once more if its process was killed."""
        for is_last in (False, True):
            try:
                return self._process.pass_on(work.app, app, request, work.deadline_s)
            except TrainerFailed as err:
                if err.kind not in _RETRYABLE or is_last:
                    raise
                log.warning("the app %s failed and starts again: %s", work.app, err.message)
                self._process.stop()
        raise AssertionError("the last try returns or raises")

    def _seal(self, work: AppWork, key: str, done: Done = Done()) -> tuple[bytes, bytes]:
        answer = AppAnswer(
            run=work.run,
            number=work.number,
            key=key,
            peer=self._me.peer,
            told=done.description,
            digest=done.digest,
            nbytes=done.nbytes,
            nonce=secrets.token_hex(12),
            fleet=self._me.fleet,
        )
        return SIGNED_APP_ANSWER.seal(answer, self._me.sign)

    def _reply(self, answer: bytes, signature: bytes) -> RecordDict:
        return RecordDict({RECORD: ConfigRecord({"answer": answer, "signature": signature})})

    # --- files ---

    def _file(self, run: str) -> Path:
        return path_in(self._folder, run, ".json")

    def _out(self, work: AppWork) -> Path:
        return path_in(self._process.folder_of(work.app) / _RUNS, work.run)

    def _opened_out(self, work: AppWork) -> AbstractContextManager[OwnFolder]:
        return own_folders.opened(self._process.folder_of(work.app), _RUNS, work.run)

    def _arrays(self, work: AppWork, key: str) -> Path:
        return path_in(self._out(work), key, _ARRAYS)

    def _last(self, run: str) -> _Stored | None:
        """The last answer of a run, or None."""
        return read_json(self._file(run), _Stored)

    def _load(self, work: AppWork, key: str) -> _Stored | None:
        """The answer to this message, if it is the last one of its run and its file is there."""
        stored = self._last(work.run)
        if stored is None:
            return None
        with contextlib.suppress(BadMessage):
            answer = SIGNED_APP_ANSWER.decode(stored.answer)
            if answer.key == key and self._is_whole(work, key, answer.digest):
                return stored
        return None

    def _is_whole(self, work: AppWork, key: str, digest: str) -> bool:
        """False if the file of an answer is missing, or was damaged by a power cut."""
        if digest and key != self._verified:
            try:
                if not self._is_plain(work, key) or file_digest(self._arrays(work, key)) != digest:
                    return False
            except OSError:
                return False
        self._verified = key
        return True

    def _drop_old(self, work: AppWork, key: str) -> None:
        """Delete the files of earlier messages of the run, and of the oldest runs."""
        self._delete(work, lambda name: not name.startswith(key))
        files = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for old in files[:-MAX_RUNS]:
            if (stored := self._last(old.stem)) is not None:
                app = self._process.folder_of(stored.app)
                with contextlib.suppress(OSError), own_folders.opened(app, _RUNS) as runs:
                    runs.remove_folder(old.stem)
            old.unlink(missing_ok=True)

    def _delete(self, work: AppWork, is_old: Callable[[str], bool]) -> None:
        """Delete the files with these names; the app may have made, or deleted, folders there."""
        with contextlib.suppress(OSError), self._opened_out(work) as out:
            for name in filter(is_old, out.names()):
                with contextlib.suppress(OSError):
                    out.unlink(name)

    def _is_plain(self, work: AppWork, key: str) -> bool:
        """False if the app has put a link or a pipe in place of the arrays of an answer."""
        with contextlib.suppress(OSError), self._opened_out(work) as out:
            return out.is_file(key + _ARRAYS)
        return False


def _shown(work: AppWork) -> Work:
    """The work as the agent's status and its policy see it."""
    kind: WorkKind = "evaluate" if work.message_type.startswith("evaluate") else "train"
    return Work(run=work.run, round=work.round, kind=kind, task=PREFIX + work.app)
