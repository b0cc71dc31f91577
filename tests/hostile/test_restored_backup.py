"""A backup of yesterday is restored: what ended since then does not begin again."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from coordinator.admin import backup
from coordinator.fleet.registry import Registry
from coordinator.storage import settings
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.enrollment import tickets
from protocols.errors import Refused
from tests.support.https_site import Machine


@pytest.mark.attack("strangers")
@pytest.mark.parametrize("ended", ["used", "revoked"])
def test_a_ticket_that_was_used_is_worth_nothing_after_a_restore(
    tmp_path: Path, coordinator_home: Path, ended: str
) -> None:
    """Attack: keep a ticket that was used or revoked, and join with it once a backup from before
    is restored."""
    home, again = settings.init(["localhost"])[0], tmp_path / "again"
    ticket = tickets.new_ticket(("host:1",), bytes(32))
    with contextlib.closing(SqliteLedger(home / "ledger.db")) as ledger:
        registry = Registry(ledger)
        registry.create_ticket(ticket, ttl_s=60.0, uses=1)
        member = registry.join(Machine("member").joining(_ticket(registry)))
        backup.write(home, tmp_path / "backup", with_versions=False)
        if ended == "used":
            registry.join(Machine("honest").joining(ticket))
        else:
            registry.revoke_ticket(ticket.id)
    backup.restore(tmp_path / "backup", again)
    with contextlib.closing(SqliteLedger(again / "ledger.db")) as ledger:
        registry = Registry(ledger)
        with pytest.raises(Refused, match="revoked"):
            registry.join(Machine("thief").joining(ticket))
        assert registry.enrolled() == [member]


def _ticket(registry: Registry) -> tickets.Ticket:
    ticket = tickets.new_ticket(("host:1",), bytes(32))
    registry.create_ticket(ticket, ttl_s=60.0, uses=1)
    return ticket
