"""What a peer sends to a coordinator that lost its disk, and what the owner's ledger says of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from agent.clientapp.interfaces import PeerIdentity
from agent.clientapp.recovery import PROOF, Recall
from agent.home import audit_log
from agent.home.audit_log import AuditEntry
from agent.transport import version_proofs
from protocols.enrollment import identity
from protocols.errors import Refused
from protocols.messages.work import SIGNED_WORK, UpdateClaim, Work
from protocols.model.weights import file_digest

KEY, COORDINATOR = identity.new_signing_key(), identity.new_signing_key()


def held(folder: Path) -> Work:
    """A version in the agent's cache, with the coordinator's proof."""
    file = folder / "version"
    file.write_bytes(b"a version")
    digest = file_digest(file)
    file.replace(folder / f"{digest}.safetensors")
    work = Work(run="r", round=3, kind="evaluate", task="mnist", base=digest)
    version_proofs.save_proof(folder, work, *SIGNED_WORK.seal(work, COORDINATOR.sign))
    return work


def recall(
    folder: Path,
    send: Callable[[str, Path], None],
    on_leaving: Callable[[UpdateClaim, str, bytes], None] | None = None,
) -> Recall:
    me = PeerIdentity("P", KEY.sign, identity.public_bytes(COORDINATOR))
    return Recall(me, folder, send, on_leaving or partial(audit_log.write_update, folder))


def test_a_version_is_in_the_owners_ledger_before_it_is_sent(tmp_path: Path) -> None:
    work = held(tmp_path)
    sent: list[tuple[str, list[AuditEntry]]] = []
    answer = recall(tmp_path, lambda digest, _: sent.append((digest, audit_log.read(tmp_path))))
    content = answer.answer(Work(run="r", round=3, kind="holdings", task="mnist"))
    assert PROOF in content
    assert sent == []
    (told,) = audit_log.read(tmp_path)
    assert (told.what, told.nbytes) == ("held version", 0)
    assert work.base in told.told
    answer.answer(Work(run="r", round=3, kind="recall", task="mnist", base=work.base))
    ((digest, then),) = sent
    assert (digest, then[1:]) == (work.base, audit_log.read(tmp_path)[1:])
    assert (then[1].what, then[1].digest, then[1].nbytes) == ("version", work.base, 9)
    assert "version, 9 bytes" in audit_log.format_entry(then[1])


def test_a_version_that_cannot_be_noted_is_not_sent(tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    work, sent = held(tmp_path), list[str]()
    answer = recall(tmp_path, lambda digest, _: sent.append(digest), full)
    for kind in ("holdings", "recall"):
        with pytest.raises(OSError, match="No space"):
            answer.answer(Work(run="r", round=3, kind=kind, task="mnist", base=work.base))
    assert sent == []


def test_a_version_that_is_not_here_is_refused_and_not_noted(tmp_path: Path) -> None:
    answer = recall(tmp_path, lambda *_: None)
    with pytest.raises(Refused, match="no longer here"):
        answer.answer(Work(run="r", round=3, kind="recall", task="mnist", base="0" * 64))
    assert audit_log.read(tmp_path) == []
