"""A stolen signing key is worth nothing after its rotation, and no machine joins again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.fleet_harness import fleet, free_port
from tests.support.waiting import wait_for


@pytest.mark.long
@pytest.mark.attack("20.keys")
def test_an_agent_takes_the_new_key_and_works(tmp_path: Path) -> None:
    """Attack: the coordinator's signing key was stolen; its operator replaces it."""
    port = free_port()
    with fleet(tmp_path) as site:
        up = site.up(port=port)
        site.join("ada")
        file = tmp_path / "ada" / "enrolled.json"
        joined = json.loads(file.read_text())
        # As a home of an older version, which has no card yet.
        file.write_text(json.dumps({key: joined[key] for key in joined if key != "card"}))
        site.start("ada")
        assert json.loads(file.read_text()) == joined, "it has a card after its first session"
        refused = site.ask("keys", "rotate", "signing")
        assert refused.returncode == 1
        assert "is running" in refused.stderr
        up.stop()
        digest = site.data("keys", "rotate", "signing")["sha256"]
        site.data("keys", "rotate", "operator")
        site.up(port=port)

        def has_new_key() -> bool:
            now = json.loads(file.read_text())
            return bool(now["coordinator_public"] != joined["coordinator_public"])

        wait_for(has_new_key, "ada has the new key")
        site.until_agent("ada", "is back", lambda told: told["session"] and told["mqtt"])
        assert json.loads(file.read_text())["peer"] == joined["peer"]
        run = site.ended_run(site.start_run("ping", "--rounds", "1", "--quorum", "1"))
        assert run["state"] == "finished"
        status = site.data("keys", "status")
        assert (status["signing"], status["is_announced"]) == (digest, True)
        assert site.programs["ada"].process.poll() is None, "the same process"
