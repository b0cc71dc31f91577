"""Real coordinators that lie, and real agents that compare what they are shown."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict
from msgspec.structs import replace

from agent.daemon import gossip_loop
from agent.daemon.state_machine import SessionChanged
from agent.tasks.demo.ping import Ping
from coordinator.daemon.coordinator import Coordinator
from coordinator.storage import run_events
from coordinator.storage.sqlite_ledger import SqliteLedger
from coordinator.storage.weight_store import WeightStore
from protocols.enrollment import fork_proof
from protocols.messages.work import SIGNED_WORK
from protocols.model import weights
from protocols.model.weights import Weights
from tests.support.fleet_harness import Fleet, fleet, free_port
from tests.support.https_site import Site
from tests.support.in_process_fleet import fleet_of, some_data
from tests.support.lone_peers import Peer, without_coordinator
from tests.support.version_logs import Follower, Shown, SiteAuthority
from tests.support.waiting import until, wait_for

REFUSED = "refused: the coordinator showed two versions"


def proofs(folder: Path) -> list[Path]:
    return sorted((folder / "proofs").glob("*.proof.json"))


@pytest.mark.attack("20.11")
async def test_a_model_for_one_peer_alone(tmp_path: Path) -> None:
    """Attack: give one peer another model than the round's, with a true signature and log."""
    async with fleet_of(tmp_path, some_data(8, 1), some_data(8, 2)) as site:
        lie(site.hub, victim=site.agents[1].peer)
        run = site.start(rounds=2, quorum=1, deadline_s=2.0)
        await until(lambda: site.refusals(run))
        assert {(peer, reason) for _, peer, reason in site.refusals(run)} == {
            (site.agents[1].peer, "log_conflict")
        }
        assert ("train", 1) not in site.agents[1].trainer.worked
        site.hub.runs.stop(run)
        await site.finished(run)


def lie(hub: Coordinator, victim: str) -> None:
    """Send the victim work on a model of the liar's choice, with a true signature."""
    push = hub._grid.push_messages

    def push_changed(messages: Any) -> Any:
        for message in messages:
            config = message.content.config_records.get("config")
            work = SIGNED_WORK.decode(config["work"]) if config else None
            node = message.metadata.dst_node_id
            if work and work.kind == "train" and hub._sessions.peer_of(node) == victim:
                store = hub.weight_store
                model = weights.load(store.version_path(work.base))
                other = store.save(Weights({name: array + 1 for name, array in model.items()}))
                assert other != work.base
                payload, signature = SIGNED_WORK.seal(
                    replace(work, base=other), hub._keys.sign_key.sign
                )
                changed = {**config, "work": payload, "signature": signature}
                message.content = RecordDict({**message.content, "config": ConfigRecord(changed)})
        return push(messages)

    hub._grid.push_messages = push_changed  # type: ignore[method-assign]


@pytest.mark.attack("20.11")
@pytest.mark.parametrize("has_session", [True, False])
async def test_peers_find_out_without_the_coordinator(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_session: bool
) -> None:
    """Attack: pass on nothing of what peers have seen, while they share versions."""
    monkeypatch.setattr(gossip_loop, "_TICK_S", 0.02)
    monkeypatch.setattr(gossip_loop, "MIN_INTERVAL_S", 0.05)
    monkeypatch.setattr(gossip_loop, "SEEN_INTERVAL_S", 0.05)
    authority = SiteAuthority(site)
    first = Shown(authority, tmp_path / "first")
    first.start()
    second = first.copy(tmp_path / "second")
    followers = []
    peers = [Peer(site, tmp_path, name) for name in ("ann", "bob")]
    for peer, shown in zip(peers, (first, second), strict=True):
        follower = Follower(authority, tmp_path / f"log of {peer.name}", shown, peer.machine)
        shown.version(1, f"for {peer.name}")
        follower.train(1, f"for {peer.name}")
        peer.gossip.own_seen, peer.gossip.on_seen = follower.log.last_seen, follower.log.offer
        peer.spread._log = follower.log
        followers.append(follower)
        if has_session:
            peer.loop.dispatch(SessionChanged(True))

    def all_know() -> bool:
        for follower in followers:
            follower.log.process()
        return all(follower.forks for follower in followers)

    async with without_coordinator(*peers):
        await until(all_know)
    for follower in followers:
        follower.log.close()
    first.close()
    second.close()


@pytest.mark.long
@pytest.mark.attack("20.11")
def test_two_coordinators_of_one_fleet_are_found_out(tmp_path: Path) -> None:
    """Attack: run two coordinators with the same keys, and give each half of a fleet a model."""
    port = free_port()
    with fleet(tmp_path) as site:
        first = site.up(port=port)
        site.join("ada", "bob")
        run = site.start_run("ping", "--rounds", "3", "--quorum", "1")
        first.stop()
        shutil.copytree(site.home, tmp_path / "second")
        give_first_weights(tmp_path / "second", run)
        site.up(port=port)
        site.start("ada")
        until_trained(site, "ada", 3)
        site.programs["up"].stop()
        move_home(site, "coordinator", "first")
        move_home(site, "second", "coordinator")
        site.programs["ada"].stop()
        site.up(port=port)
        site.start("bob")
        until_trained(site, "bob", 3)
        # They meet: here by the second coordinator itself, which passes on what ada has seen.
        site.start_agent("ada")
        wait_for(lambda: proofs(tmp_path / "ada"), "ada has the proof")
        site.until_agent(
            "ada",
            "is stopped and says why",
            lambda told: told["reason"] == REFUSED and "two" in told["last_error"],
        )
        text = site.ask_agent("ada", "ledger", "audit", "show").stdout
        assert "audit acknowledge" in text
        proof = proofs(tmp_path / "ada")[0]
        ca = tmp_path / "ca.pem"
        ca.write_text(json.loads((tmp_path / "bob" / "enrolled.json").read_text())["ca_pem"])
        done = site.ask_agent("nobody", "ledger", "audit", "verify", str(proof), "--ca", str(ca))
        assert (done.returncode, done.stderr) == (0, "")
        assert "the coordinator of fleet" in done.stdout
        fork_proof.check(ca.read_bytes(), fork_proof.decode(proof.read_bytes()))
        broken = tmp_path / "broken.json"
        broken.write_bytes(proof.read_bytes().replace(b'"second":"', b'"second":"AAAA', 1))
        done = site.ask_agent("nobody", "ledger", "audit", "verify", str(broken), "--ca", str(ca))
        assert done.returncode == 1
        assert "proves nothing" in done.stderr
        shown = {peer["name"]: peer for peer in site.data("peers", "list")}
        assert (shown["ada"]["state"], shown["ada"]["reason"]) == ("error", REFUSED)
        heads = tmp_path / "heads.json"
        assert site.ask_agent("ada", "ledger", "audit", "heads", str(heads)).returncode == 0
        assert site.ask("admin", "audit", "verify").returncode == 0
        done = site.ask("admin", "audit", "verify", str(heads))
        assert done.returncode == 1
        assert "rewritten, or is another one: ada saw entry" in done.stderr
        assert site.ask_agent("bob", "ledger", "audit", "verify", str(heads)).returncode == 1
        assert any("ledger that is not this one" in event for event in site.events())
        # The peer that it meets without any coordinator stops as well.
        wait_for(lambda: proofs(tmp_path / "bob"), "bob has a proof")
        site.until_agent("bob", "is stopped", lambda told: told["reason"] == REFUSED)
        assert site.ask_agent("ada", "resume").returncode == 0
        site.programs["ada"].stop()
        site.start_agent("ada")
        site.until_agent("ada", "is stopped again", lambda told: told["reason"] == REFUSED)
        for name in ("ada", "bob"):
            assert site.ask_agent(name, "ledger", "audit", "acknowledge").returncode == 0
            site.until_agent(name, "goes on", lambda told: told["state"] == "idle")
        again = site.start_run("ping", "--rounds", "2", "--quorum", "2")
        assert site.ended_run(again)["state"] == "finished"


def give_first_weights(home: Path, run: str) -> None:
    """Let a run begin with other weights than its peers would make."""
    other = Ping().init(7, {})
    with contextlib.closing(SqliteLedger(home / "ledger.db")) as ledger:
        event = run_events.WeightsInitialised(WeightStore(home).save(other), "file")
        ledger.append(run, [run_events.encode(event)])


def until_trained(site: Fleet, name: str, rounds: int) -> None:
    def trained() -> bool:
        try:
            with sqlite3.connect(site.folder / name / "log.db") as db:
                found = db.execute("SELECT MAX(number) FROM entries WHERE kind = 'version'")
                return bool((found.fetchone()[0] or 0) >= rounds)
        except sqlite3.OperationalError:
            return False

    wait_for(trained, f"{name} has trained round {rounds}")


def move_home(site: Fleet, name: str, to: str) -> None:
    (site.folder / name).rename(site.folder / to)
