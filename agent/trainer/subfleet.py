"""A trainer whose model and data are another fleet: `python -m agent.trainer.subfleet HOME`.

It speaks the frames of `agent.trainer.ipc` as `agent.trainer` does. What it is asked for it has the
coordinator whose home this is do with its own fleet, as a run of that one part (`RunSpec.only`),
and gives back the folded mean with the examples of all who contributed: so two levels add up to the
weights that one level would give, and the fleet further up learns of no peer by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import ssl
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import httpx
import msgspec

from agent.trainer.ipc import (
    Answer,
    Cancel,
    Describe,
    Done,
    Evaluate,
    Failed,
    Init,
    Phase,
    Predict,
    Progress,
    Ready,
    Request,
    Train,
    Work,
    decode_request,
    encode,
)
from protocols.enrollment import identity, signed_requests
from protocols.errors import CommonweightError, DataFault, NotRunning, Refused, Unreachable
from protocols.messages.envelope import Metrics
from protocols.model import schema_card
from protocols.model.weights import file_digest
from protocols.network.error_text import why

_LOOK_S, _TIMEOUT_S = 0.2, 30.0
#: What the trainer adds to a task's settings; runs have fields of their own for it.
_ADDED = frozenset({"seed", "round"})


class Cancelled(Exception):
    """The work is not wanted any more."""


class LocalFleet:
    """The coordinator on this machine, asked as its operator."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._key = identity.load_signing_key(home / "operator.key")

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """What the coordinator answers. Raises NotRunning, Unreachable, Refused."""
        try:
            address = json.loads((self._home / "up.json").read_bytes())["address"]
        except (OSError, ValueError, KeyError) as err:
            raise NotRunning("this fleet's own coordinator is not up", "commonweight up") from err
        data = b"" if body is None else msgspec.json.encode(body)
        sha256 = hashlib.sha256(data).hexdigest()
        headers = signed_requests.headers("operator", self._key.sign, method, path, sha256)
        context = ssl.create_default_context(cadata=(self._home / "ca.pem").read_text())
        try:
            with httpx.Client(verify=context, timeout=_TIMEOUT_S) as http:
                url = f"https://{address}{path}"
                answer = http.request(method, url, content=data, headers=headers)
        except httpx.HTTPError as err:
            raise Unreachable(f"this fleet's own coordinator does not answer: {why(err)}") from err
        told = json.loads(answer.content or b"{}")
        if answer.status_code >= 300:
            raise Refused(str(told.get("message", answer.status_code)), str(told.get("hint", "")))
        return told

    def version(self, digest: str) -> Path:
        """Where the coordinator keeps a version."""
        return self._home / "versions" / f"{digest}.safetensors"

    def lend(self, file: Path) -> tuple[str, bool]:
        """Put a version among the coordinator's: its digest, and whether it was not there."""
        digest = file_digest(file)
        there = self.version(digest)
        if there.exists():
            return digest, False
        partial = there.with_name(f".{digest}.lent")
        shutil.copyfile(file, partial)
        os.replace(partial, there)
        return digest, True


class FleetTrainer:
    """Does one work after another. `send` gives an answer to the parent."""

    def __init__(self, fleet: LocalFleet, send: Any) -> None:
        self._fleet, self._send = fleet, send
        self._cancelled = -1

    def cancel(self, work: int) -> None:
        """Called by the reader thread."""
        self._cancelled = work

    def serve(self, work: Work) -> None:
        """Do one work and answer with Done or Failed."""
        answer: Answer
        try:
            answer = self._do(work)
        except Cancelled:
            answer = Failed(id=work.id, kind="cancelled", message="the work was cancelled")
        except CommonweightError as err:
            answer = Failed(id=work.id, kind=err.code, message=err.message, hint=err.hint)
        except OSError as err:
            answer = Failed(id=work.id, kind="file", message=f"a file cannot be used: {err}")
        self._send(answer)

    def _do(self, work: Work) -> Done:
        match work:
            case Describe():
                run = self._errand(work, {"only": "describe", "handshake": True})
                if run["preprocessing"] and "preprocessing" not in work.settings:
                    raise DataFault(
                        "tables are not surveyed over two levels of fleets",
                        "let the peers of this fleet join the upper one themselves",
                    )
                told = msgspec.convert(run["card"], schema_card.SchemaCard)
                return Done(id=work.id, description=schema_card.encode(told))
            case Predict():
                raise Refused("a fleet answers for no rows", "ask its own coordinator")
            case Init():
                run = self._errand(work, {"only": "init", "seed": work.seed})
                return self._given(work.id, run["head"], Path(work.out))
            case Train():
                run, lent = self._on_base(work, "train")
                closed = run["history"][-1]
                given = self._given(
                    work.id, closed["digest"], Path(work.out), keep=closed["digest"] in lent
                )
                for digest in lent:
                    self._fleet.version(digest).unlink(missing_ok=True)
                metrics = msgspec.convert(closed["metrics"], Metrics)
                return msgspec.structs.replace(
                    given, num_examples=closed["num_examples"], metrics=metrics
                )
            case Evaluate():
                run, lent = self._on_base(work, "evaluate")
                closed = run["history"][-1]
                for digest in lent:
                    self._fleet.version(digest).unlink(missing_ok=True)
                return Done(
                    id=work.id,
                    num_examples=closed["num_evaluated"],
                    metrics=msgspec.convert(closed["metrics"], Metrics),
                )

    def _on_base(self, work: Train | Evaluate, only: str) -> tuple[Any, set[str]]:
        """The run of an errand on the version that came from further up; versions lent for it."""
        digest, lent = self._fleet.lend(Path(work.base))
        spec = {
            "only": only,
            "seed": int(work.settings.get("seed", 0)),
            "first_round": max(1, int(work.settings.get("round", 1))),
        }
        return self._errand(work, spec, digest), {digest} if lent else set()

    def _errand(self, work: Work, spec: dict[str, Any], base: str = "") -> Any:
        """Have the fleet do it; the run as it ended. Raises CommonweightError, Cancelled."""
        settings = {name: v for name, v in work.settings.items() if name not in _ADDED}
        order = {
            "spec": {
                "task": work.task,
                "rounds": spec.get("first_round", 1),
                "settings": settings,
                "keep_versions": 1,
                **spec,
            },
            "from_digest": base,
        }
        run = self._fleet.ask("POST", "/cw/v1/runs", order)["run"]
        while True:
            told = self._fleet.ask("GET", f"/cw/v1/runs/{run}")
            if told["state"] in ("finished", "stopped", "failed"):
                break
            if self._cancelled == work.id:
                self._fleet.ask("POST", f"/cw/v1/runs/{run}/stop")
                raise Cancelled
            self._tell(work, told)
            time.sleep(_LOOK_S)
        if told["state"] != "finished":
            raise Refused(f"this fleet's run {run} {told['state']}: {told['ended_because']}")
        return told

    def _tell(self, work: Work, run: Any) -> None:
        """How many of the fleet have answered, as the steps of the work."""
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

    def _given(self, work: int, digest: str, out: Path, *, keep: bool = False) -> Done:
        """Move a version of the coordinator's to `out`: nobody else needs it."""
        there, partial = self._fleet.version(digest), out.with_name(f".{out.name}.fleet.tmp")
        shutil.copyfile(there, partial)
        os.replace(partial, out)
        if not keep:
            there.unlink(missing_ok=True)
        return Done(id=work, digest=digest, nbytes=out.stat().st_size)


def _read(lines: IO[bytes], trainer: FleetTrainer, works: list[Work], ready: Any) -> None:
    """The reader thread: a cancel acts at once, works wait; without a parent there is an end."""
    for line in lines:
        request: Request = decode_request(line)
        if isinstance(request, Cancel):
            trainer.cancel(request.id)
        elif isinstance(request, Work):
            works.append(request)
            ready.release()
    os._exit(0)


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sending = threading.Lock()

    def send(answer: Answer) -> None:
        with sending:
            answers.write(encode(answer) + b"\n")
            answers.flush()

    trainer = FleetTrainer(LocalFleet(Path(sys.argv[1])), send)
    works: list[Work] = []
    ready = threading.Semaphore(0)
    arguments = (sys.stdin.buffer, trainer, works, ready)
    threading.Thread(target=_read, args=arguments, name="requests", daemon=True).start()
    send(Ready())
    while True:
        ready.acquire()
        trainer.serve(works.pop(0))


if __name__ == "__main__":
    main()
