"""What an agent holds of the shared weights, and can prove years later."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agent.transport import version_proofs
from protocols.enrollment import identity
from protocols.messages.work import SIGNED_WORK, Work
from protocols.model import weights
from protocols.model.weights import Weights

COORDINATOR = identity.new_signing_key()
PUBLIC = identity.public_bytes(COORDINATOR)
FLEET = "f" * 16


def bring(
    folder: Path, number: int, key: identity.SigningKey = COORDINATOR, fleet: str = FLEET
) -> Work:
    """A version arrives, and work on it."""
    file = folder / "arriving"
    digest = weights.save(Weights({"w": np.full(3, number, np.float32)}), file)
    file.rename(folder / f"{digest}.safetensors")
    work = Work(run="r", round=number, kind="train", task="t", base=digest, fleet=fleet)
    version_proofs.save_proof(folder, work, *SIGNED_WORK.seal(work, key.sign))
    return work


def test_the_last_versions_are_held_with_their_proofs(tmp_path: Path) -> None:
    works = [bring(tmp_path, number) for number in (1, 2)]
    found = version_proofs.list_verified(tmp_path, PUBLIC, FLEET)
    assert {held.work.round for held in found} == {1, 2}
    for held in found:
        assert held.work in works
        assert weights.file_digest(held.path) == held.work.base
        signed = SIGNED_WORK.open(
            held.payload, held.signature, lambda sig, part: identity.verify(PUBLIC, sig, part)
        )
        assert signed == held.work


def test_the_first_proof_of_a_version_stays(tmp_path: Path) -> None:
    work = bring(tmp_path, 1)
    later = Work(run="r", round=2, kind="train", task="t", base=work.base)
    version_proofs.save_proof(tmp_path, later, *SIGNED_WORK.seal(later, COORDINATOR.sign))
    assert [held.work for held in version_proofs.list_verified(tmp_path, PUBLIC, FLEET)] == [work]


def test_the_proof_goes_with_its_version(tmp_path: Path) -> None:
    first = bring(tmp_path, 1)
    (tmp_path / f"{first.base}.safetensors").unlink()
    assert version_proofs.list_verified(tmp_path, PUBLIC, FLEET) == []
    second = bring(tmp_path, 2)
    assert [file.name for file in tmp_path.glob(f"*{version_proofs.SUFFIX}")] == [
        second.base + version_proofs.SUFFIX
    ]


@pytest.mark.parametrize("damage", ["bytes", "proof", "name", "key", "fleet"])
def test_what_is_damaged_or_forged_is_not_shown(tmp_path: Path, damage: str) -> None:
    stranger = identity.new_signing_key()
    key, fleet = stranger if damage == "key" else COORDINATOR, "0" * 16 * (damage == "fleet")
    work = bring(tmp_path, 1, key, fleet or FLEET)
    version, proof = (
        tmp_path / f"{work.base}{end}" for end in (".safetensors", version_proofs.SUFFIX)
    )
    if damage == "bytes":
        data = bytearray(version.read_bytes())
        data[-1] ^= 1
        version.write_bytes(data)
    if damage == "proof":
        proof.write_bytes(proof.read_bytes()[:-20])
    if damage == "name":
        for file in (version, proof):
            file.rename(file.with_name("f" * 64 + file.name[64:]))
    assert version_proofs.list_verified(tmp_path, PUBLIC, FLEET) == []


def test_a_proof_of_an_older_coordinator_names_no_fleet(tmp_path: Path) -> None:
    work = bring(tmp_path, 1, fleet="")
    assert [held.work for held in version_proofs.list_verified(tmp_path, PUBLIC, FLEET)] == [work]


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    assert version_proofs.list_verified(tmp_path, PUBLIC, FLEET) == []
