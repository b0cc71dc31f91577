"""Requests for the log of versions: their numbers, and what they cost the coordinator."""

from __future__ import annotations

import contextlib
import http.client
import ssl
from pathlib import Path
from typing import Any

import pytest

from coordinator.storage import run_events
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.messages import version_log as wire
from tests.support.https_site import Site
from tests.support.version_logs import RUN, Authority, Shown

pytestmark = pytest.mark.attack("20.11", by="peer")


def test_a_page_reads_no_more_of_the_ledger_than_its_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: a peer asks for pages without end in a fleet whose rounds have thousands of entries,
    so that each page reads all of the ledger between its versions."""
    shown = Shown(Authority(tmp_path / "authority"), tmp_path / "shown")
    shown.start()
    lost = run_events.encode(run_events.PeerLost("ada", "went away"))
    for number in range(1, 31):
        shown.version(number)
        if number in (10, 20):
            shown.take_back(f"version {number}", f"version {number - 1}")
            shown.version(number)
        shown.ledger.append(RUN, [lost] * 400)
    whole = wire.decode_page(shown.log.page(0))
    rows = 0
    original = SqliteLedger.entries_after

    def counted(self: SqliteLedger, *arguments: Any) -> Any:
        nonlocal rows
        found = original(self, *arguments)
        rows += len(found)
        return found

    monkeypatch.setattr(SqliteLedger, "entries_after", counted)
    hashes = [wire.START, *wire.chain_all(wire.START, 0, whole.entries)]
    assert len(whole.entries) == 2 + 30 + 2 * 2
    for start in range(len(whole.entries) + 1):
        page = wire.decode_page(shown.log.page(start))
        assert (page.start, page.before) == (start, hashes[start])
        assert page.entries == whole.entries[start:]
    assert wire.decode_page(shown.log.page(10**15)).entries == ()
    assert rows == 0, "all was read before"
    shown.close()


@pytest.mark.attack("20.strangers", by="stranger")
def test_a_number_of_any_length_is_no_error(site: Site) -> None:
    """Attack: ask without a key for the log from a number of 5,000 digits, so that the server
    raises an error before it checks the key, and logs each one."""
    context = ssl.create_default_context(cadata=site.ca_pem.decode())
    for number in ("9" * 5000, "9" * 16, "-1", "1e3", "%D9%A1", "0x1", "%31", "0", "0" * 5000):
        connection = http.client.HTTPSConnection(site.address, context=context)
        with contextlib.closing(connection):
            connection.request("GET", wire.LOG_PATH.format(start=number))
            assert connection.getresponse().status == 401, number[:20]
