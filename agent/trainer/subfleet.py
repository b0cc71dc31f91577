"""A trainer whose model and data are another fleet: `python -m agent.trainer.subfleet HOME`.

It uses the main loop of `agent.trainer`. Each piece of work becomes a run of that one part
(`RunSpec.only`) on the coordinator with this home. The result is the mean of the updates, with the
number of all examples. So two levels give the same weights as one, and the upper fleet gets nothing
about single peers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from agent.tasks.work import Describe, Done, Evaluate, Export, Init, Measure, Predict, Train, Work
from agent.trainer import main_loop
from agent.trainer.ipc import Phase, Progress
from agent.trainer.main_loop import Send
from agent.trainer.progress import WorkControl
from protocols.enrollment import identity, signed_requests
from protocols.errors import (
    CommonweightError,
    NotRunning,
    SubfleetFailed,
    SubfleetStopped,
    Unreachable,
)
from protocols.local import bounded_http
from protocols.local.safe_paths import path_in
from protocols.messages.envelope import Metrics
from protocols.model import schema_card
from protocols.model.weights import file_digest
from protocols.network.error_text import describe_error

_POLL_S, _TIMEOUT_S = 0.2, 30.0
_MAX_ANSWER_BYTES = 64 * 1024 * 1024
#: Settings that the trainer adds; runs have their own fields for them.
_RUN_SETTINGS = frozenset({"seed", "round"})
#: The default of runs, for the runs of this fleet.
_OUTLIER_LIMIT = 3.0


class LocalCoordinator:
    """A client of the coordinator on this machine, with the operator's key."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._key = identity.load_signing_key(home / "operator.key")

    def request(self, method: str, path: str, body: object = None) -> Any:
        """The response, decoded. Raises NotRunning, Unreachable, SubfleetFailed."""
        try:
            up = json.loads((self._home / "up.json").read_bytes())
            address = up["address"]
            ca_pem = (self._home / "ca.pem").read_text()
        except (OSError, ValueError, KeyError) as err:
            raise NotRunning("this fleet's own coordinator is not up", "commonweight up") from err
        data = b"" if body is None else msgspec.json.encode(body)
        sha256 = hashlib.sha256(data).hexdigest()
        receiver = str(up.get("fleet", ""))
        headers = signed_requests.sign_headers(
            "operator", self._key.sign, method, path, sha256, receiver
        )
        context = ssl.create_default_context(cadata=ca_pem)
        try:
            with httpx.Client(verify=context, timeout=_TIMEOUT_S) as http:
                url = f"https://{address}{path}"
                answer = bounded_http.request(
                    http, method, url, max_bytes=_MAX_ANSWER_BYTES, content=data, headers=headers
                )
        except httpx.HTTPError as err:
            raise Unreachable(
                f"this fleet's own coordinator does not answer: {describe_error(err)}"
            ) from err
        told = json.loads(answer.content or b"{}")
        if answer.status_code >= 300:
            why = told.get("message", f"HTTP {answer.status_code}")
            raise SubfleetFailed(f"the fleet below refuses it: {why}", str(told.get("hint", "")))
        return told

    def version_path(self, digest: str) -> Path:
        """The coordinator's file of a version."""
        return path_in(self._home / "versions", digest, ".safetensors")

    @contextlib.contextmanager
    def lend_version(self, file: Path) -> Iterator[str]:
        """Copy a version to the coordinator while the context is open; gives its digest."""
        digest = file_digest(file)
        there = self.version_path(digest)
        if there.exists():  # the coordinator has it already
            yield digest
            return
        try:
            _copy(file, there)
            yield digest
        finally:
            there.unlink(missing_ok=True)


class FleetExecutor:
    """Does work as runs of the local fleet; progress goes to `send`."""

    def __init__(self, fleet: LocalCoordinator, control: WorkControl, send: Send) -> None:
        self._fleet, self._control, self._send = fleet, control, send

    def do(self, work: Work) -> Done:
        """Do the work. Raises CommonweightError, OSError, Cancelled."""
        match work:
            case Describe():
                run = self._run(work, {"only": "describe", "handshake": True})
                if run["preprocessing"] and "preprocessing" not in work.settings:
                    raise SubfleetFailed(
                        "categories and classes are not agreed on over two levels of fleets",
                        "let the peers of the fleet below join the upper one; or, for pictures, "
                        "--set classes=cat,dog",
                    )
                told = msgspec.convert(run["card"], schema_card.SchemaCard)
                return Done(
                    id=work.id,
                    description=schema_card.encode(told),
                    num_examples=_sum_declared(run, 0),
                    num_held_out=_sum_declared(run, 1),
                )
            case Predict() | Export() | Measure():
                raise SubfleetFailed("a fleet answers for no rows", "ask its own coordinator")
            case Init():
                run = self._run(work, {"only": "init", "seed": work.seed})
                return self._copy_result(work.id, run["head"], Path(work.out))
            case Train():
                with self._fleet.lend_version(Path(work.base)) as base:
                    closed = self._round(work, "train", base)
                    keep = closed["digest"] == base
                    given = self._copy_result(work.id, closed["digest"], Path(work.out), keep=keep)
                return msgspec.structs.replace(
                    given,
                    num_examples=closed["num_examples"],
                    metrics=msgspec.convert(closed["metrics"], Metrics),
                )
            case Evaluate():
                with self._fleet.lend_version(Path(work.base)) as base:
                    closed = self._round(work, "evaluate", base)
                return Done(
                    id=work.id,
                    num_examples=closed["num_evaluated"],
                    metrics=msgspec.convert(closed["metrics"], Metrics),
                )

    def _round(self, work: Train | Evaluate, only: str, base: str) -> Any:
        """The only round of a run on the version of the upper fleet."""
        spec = {
            "only": only,
            "seed": int(work.settings.get("seed", 0)),
            "first_round": max(1, int(work.settings.get("round", 1))),
        }
        return self._run(work, spec, base)["history"][-1]

    def _run(self, work: Work, spec: dict[str, Any], base: str = "") -> Any:
        """Start a run and wait; returns the ended run. Raises CommonweightError, Cancelled."""
        settings = {name: v for name, v in work.settings.items() if name not in _RUN_SETTINGS}
        order = {
            "spec": {
                "task": work.task,
                "rounds": spec.get("first_round", 1),
                "settings": settings,
                "keep_versions": 1,
                "outlier_limit": _OUTLIER_LIMIT,
                **spec,
            },
            "from_digest": base,
        }
        run = self._fleet.request("POST", "/cw/v1/runs", order)["run"]
        try:
            told = self._wait_for_end(work, run)
        except BaseException:  # also Cancelled: the run's result is no longer needed
            with contextlib.suppress(CommonweightError):
                self._fleet.request("POST", f"/cw/v1/runs/{run}/stop")
            raise
        because = told["ended_because"]
        if told["state"] == "stopped":
            raise SubfleetStopped(f"the fleet below did not finish its run: {because}")
        if told["state"] != "finished":
            raise SubfleetFailed(f"the fleet below cannot do it: {because}")
        return told

    def _wait_for_end(self, work: Work, run: str) -> Any:
        """Wait until the run has ended, and return it. Raises CommonweightError, Cancelled."""
        while True:
            told = self._fleet.request("GET", f"/cw/v1/runs/{run}")
            if told["state"] in ("finished", "stopped", "failed"):
                return told
            self._control.raise_if_cancelled(work.id)
            self._report_progress(work, told)
            time.sleep(_POLL_S)

    def _report_progress(self, work: Work, run: Any) -> None:
        """Send the number of peers that have answered as the steps of the work."""
        peers = run["peers"].values()
        phase: Phase = "evaluate" if isinstance(work, Evaluate) else "train"
        progress = Progress(
            id=work.id,
            phase="describe" if isinstance(work, Describe) else phase,
            step=sum(standing == "answered" for standing in peers),
            steps=max(1, len(peers)),
            loss=None,
            examples_per_s=0.0,
        )
        self._send(progress)

    def _copy_result(self, work: int, digest: str, out: Path, *, keep: bool = False) -> Done:
        """Copy a version of the coordinator to `out`, and delete it there unless `keep`."""
        there = self._fleet.version_path(digest)
        _copy(there, out)
        if not keep:
            there.unlink(missing_ok=True)
        return Done(id=work, digest=digest, nbytes=out.stat().st_size)


def _copy(source: Path, target: Path) -> None:
    """Copy a file atomically."""
    partial = target.with_name(f".{target.name}.fleet.tmp")
    try:
        shutil.copyfile(source, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _sum_declared(run: Any, which: int) -> int:
    """The examples that all peers of the run declare; 0 if one does not."""
    counts = [counts[which] for counts in run["declared"].values()]
    return sum(counts) if counts and all(counts) else 0


def main() -> None:
    fleet = LocalCoordinator(Path(sys.argv[1]))
    main_loop.run(lambda control, send: FleetExecutor(fleet, control, send))


if __name__ == "__main__":
    main()
