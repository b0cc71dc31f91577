"""What peers have signed of the ledger stays small, and contradicts a forged one anywhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from msgspec.structs import replace

from coordinator.storage.seen_heads import MAX_IN_STRETCH, SeenHeads
from protocols.messages.version_log import LogHead

HEAD = LogHead("f" * 16, 0, 1, bytes(32), 7, bytes(32), 1.0)


@pytest.mark.attack("20.audit", by="peer")
def test_statements_of_many_peers_do_not_fill_the_disk(tmp_path: Path) -> None:
    """Attack: many peers sign each head, so that the statements fill the disk."""
    store, peers = SeenHeads(tmp_path), [f"peer{n:03}" for n in range(3 * MAX_IN_STRETCH)]
    for stretch in range(6):
        for peer in peers:
            for ledger in (1000 * stretch + 1, 1000 * stretch + 900):
                store.add(peer, replace(HEAD, ledger=ledger), b"x")
    kept = store.all()
    store.close()
    by_stretch = Counter(one.ledger // 1000 for one in kept)
    assert by_stretch == {5: len(peers)} | dict.fromkeys(range(5), MAX_IN_STRETCH)
    newest = {one.peer for one in kept if one.ledger == 5900}
    assert newest == set(peers), "the newest of each peer stays"
