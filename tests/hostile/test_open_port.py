"""The port that an agent opens for other peers: its owner hears of it, and can close it."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from agent.home.credentials import Credentials
from agent.home.enrollment_file import read_enrollment
from agent.home.settings_schema import AgentSettings
from agent.setup import sharing_text
from agent.transport.p2p.sharing import Sharing
from protocols.enrollment import identity, tickets
from tests.support.fleet_harness import AGENT, environment, run_program
from tests.support.https_site import Site

pytestmark = pytest.mark.attack("20.16", by="stranger")


@pytest.mark.long
def test_join_and_doctor_name_the_port_and_the_command_that_closes_it(
    site: Site, tmp_path: Path
) -> None:
    """Attack: connect to a port that the owner never heard of."""
    home = tmp_path / "box"
    env = environment(tmp_path, COMMONWEIGHT_AGENT_HOME=str(home))
    joined = run_program(
        [AGENT, "join", "-", "--name", "box"], env, given=tickets.encode(site.ticket())
    )
    assert joined.returncode == 0, joined.stderr
    said = joined.stdout + joined.stderr
    assert "shares averaged versions with other peers in this private network at a free" in said
    assert "to turn sharing off: commonweight-agent policy set share off" in said
    assert "policy set share off" in run_program([AGENT, "doctor"], env).stdout
    (home / "share.port").write_text("41234")
    assert "at port 41234" in sharing_text.describe(AgentSettings(), home)
    assert "at port 9200;" in sharing_text.describe(AgentSettings(share_port=9200), home)
    assert sharing_text.describe(AgentSettings(share="off"), home) == ""
    assert run_program([AGENT, "policy", "set", "share", "off"], env).returncode == 0
    assert "off: no port is opened" in run_program([AGENT, "doctor"], env).stdout


async def test_an_agent_that_shares_nothing_opens_no_port(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: find an open port on a machine whose owner closed it."""
    home = tmp_path / "box"
    env = environment(tmp_path, COMMONWEIGHT_AGENT_HOME=str(home))
    words = [AGENT, "join", "-", "--name", "box"]
    assert run_program(words, env, given=tickets.encode(site.ticket())).returncode == 0
    opened: list[object] = []
    monkeypatch.setattr(socket.socket, "listen", lambda *args: opened.append(args))
    enrollment = read_enrollment(home)
    public = identity.public_bytes(site.sign_key)
    sharing = Sharing("off", home, Credentials.load(home, enrollment), public)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(sharing.run(), 0.5)
    assert opened == []
    assert sharing.address() == ""
