"""The peers that an owner trusts in secure sums, and the fewest of them in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.cli.main import _format_trust
from agent.home import settings
from agent.home.settings_schema import MIN_SECURE_PEERS, AgentSettings
from agent.setup.doctor import _Doctor
from protocols.errors import UsageError
from protocols.local.checks import Advice
from protocols.privacy.secagg.cohort import MIN_COHORT
from tests.agent.cli.test_main import agent
from tests.support.secure_cohort import me

FIRST, SECOND = me(1).peer, me(2).peer


def test_trusted_peers_are_added_listed_and_removed(agent_home: Path) -> None:
    code, _, said = agent(agent_home, "trust", "add", FIRST.lower(), "--name", "clinic north")
    assert code == 0
    assert f"trusts {FIRST} (clinic north)\n1 peer trusted; a secure sum needs 1 more" in said
    _, _, said = agent(agent_home, "trust", "add", SECOND)
    assert f"trusts {SECOND}\n2 peers trusted\n" in said
    code, told, _ = agent(agent_home, "trust", "list", "--json")
    assert json.loads(told)["data"] == {
        "own": "",
        "peers": [{"peer": FIRST, "name": "clinic north"}, {"peer": SECOND, "name": ""}],
        "secure_min": 0,
    }
    code, _, said = agent(agent_home, "trust", "remove", "clinic north")
    assert code == 0
    assert f"no longer trusts {FIRST}" in said
    assert settings.read(agent_home).trust == {SECOND: ""}


def test_several_peers_are_added_at_once_or_none(agent_home: Path) -> None:
    code, _, said = agent(agent_home, "trust", "add", FIRST, SECOND)
    assert (code, said) == (0, f"trusts {FIRST}\ntrusts {SECOND}\n2 peers trusted\n")
    code, _, said = agent(agent_home, "trust", "add", FIRST, SECOND, "--name", "north")
    assert code == 2
    assert "--name is for one peer" in said
    code, _, _ = agent(agent_home, "trust", "add", me(3).peer, "nonsense")
    assert code == 2
    assert settings.read(agent_home).trust == {FIRST: "", SECOND: ""}


def test_a_mistyped_id_and_an_unknown_peer_change_nothing(agent_home: Path) -> None:
    wrong = FIRST[:-1] + ("A" if FIRST[-1] != "A" else "B")
    code, _, said = agent(agent_home, "trust", "add", wrong)
    assert code == 2
    assert f"{wrong!r} is no id of a peer" in said
    assert "commonweight-agent status id" in said
    code, _, said = agent(agent_home, "trust", "remove", FIRST)
    assert code == 2
    assert "is not among the trusted peers" in said
    assert not (agent_home / settings.FILE).exists()


def test_secure_min_is_none_or_a_number_that_hides_an_update(tmp_path: Path) -> None:
    assert MIN_SECURE_PEERS == MIN_COHORT
    with pytest.raises(UsageError, match="would reveal the update of each"):
        settings.change(tmp_path, secure_min=2)
    assert settings.change(tmp_path, secure_min=0).secure_peers == 3
    assert settings.change(tmp_path, secure_min=5).secure_peers == 5
    with pytest.raises(UsageError, match="is no id of a peer"):
        settings.change(tmp_path, trust={"MALLORY": ""})
    with pytest.raises(UsageError, match="one at a time"):
        settings.parse_value("trust", FIRST)


def test_an_owner_reads_that_more_peers_must_be_trusted(agent_home: Path) -> None:
    code, _, said = agent(agent_home, "policy", "set", "secure.min", "4")
    assert code == 0
    assert "secure_min is 4, and 0 other peers are trusted: commonweight-agent trust add ID" in said
    told = _Doctor(agent_home).settings()
    assert isinstance(told, Advice)
    assert told.fix == "commonweight-agent trust add ID"
    settings.change(agent_home, trust={me(number).peer: "" for number in (1, 2, 3)})
    assert isinstance(_Doctor(agent_home).settings(), str)


def test_the_status_says_whom_the_owner_trusts() -> None:
    assert _format_trust(AgentSettings()) == []
    assert _format_trust(AgentSettings(trust={FIRST: "north", SECOND: ""}, secure_min=3)) == [
        f"trusts 2 peers in secure sums: north, {SECOND}",
        "works only in secure runs, with 3 trusted peers or more",
    ]
    assert _format_trust(AgentSettings(secure_min=3))[0] == "trusts 0 peers in secure sums"


def test_operators_do_not_see_whom_an_owner_trusts() -> None:
    chosen = AgentSettings(trust={FIRST: "north"}, secure_min=3)
    assert not {"trust", "secure_min"} & set(chosen.public_values())
