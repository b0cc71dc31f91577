"""Operations on single machines, by their owners and by the operator."""

from __future__ import annotations

import shutil

import psutil

from agent.home import audit_log
from tests.journeys.fleet import JourneyFleet
from tests.journeys.model import Model, Peer
from tests.journeys.operations import Choose, Deed, ignore, operation
from tests.support.fleet_harness import descendants


def _choose_peer(model: Model, choose: Choose, **wanted: object) -> tuple[str, Peer]:
    name = choose(model.peers_where(**wanted))
    return name, model.peers[name]


def _working(model: Model) -> bool:
    return bool(model.peers_where(standing="enrolled", is_running=True))


def _set_running(peer: Peer, value: bool) -> None:
    """A new process does not know what the operator has asked of the last one."""
    peer.is_running, peer.operator_paused = value, False


def _set_gone(peer: Peer) -> None:
    _set_running(peer, False)
    peer.standing, peer.is_old = "gone", False


@operation(lambda model: bool(model.peers_where(standing="enrolled", is_running=False)))
def start_agent(model: Model, choose: Choose) -> Deed:
    name, peer = _choose_peer(model, choose, standing="enrolled", is_running=False)
    _set_running(peer, True)
    mqtt = model.has_broker
    return lambda fleet: fleet.start_one(name, mqtt=mqtt)


@operation(_working)
def stop_agent(model: Model, choose: Choose) -> Deed:
    name, peer = _choose_peer(model, choose, standing="enrolled", is_running=True)
    _set_running(peer, False)
    return lambda fleet: fleet.stop_agent(name)


@operation(_working)
def kill_agent(model: Model, choose: Choose) -> Deed:
    name, peer = _choose_peer(model, choose, standing="enrolled", is_running=True)
    _set_running(peer, False)
    return lambda fleet: fleet.stop_agent(name, kill=True)


@operation(_working)
def kill_trainer(model: Model, choose: Choose) -> Deed:
    name, _ = _choose_peer(model, choose, standing="enrolled", is_running=True)

    def deed(fleet: JourneyFleet) -> None:
        trainers = descendants(fleet.programs[name].process.pid)
        for trainer in trainers:
            trainer.kill()
        psutil.wait_procs(trainers, timeout=10)

    return deed


@operation(_working)
def finish_agent(model: Model, choose: Choose) -> Deed:
    """The owner ends an agent after its round; this lifts every pause."""
    name, peer = _choose_peer(model, choose, standing="enrolled", is_running=True)
    _set_running(peer, False)
    peer.owner_paused = False

    def deed(fleet: JourneyFleet) -> None:
        fleet.note_family()
        fleet.do_agent(name, "finish")
        assert fleet.programs[name].wait(60) == 0

    return deed


@operation(lambda model: bool(model.peers_where(standing="enrolled", owner_paused=False)))
def pause_by_owner(model: Model, choose: Choose) -> Deed:
    name, peer = _choose_peer(model, choose, standing="enrolled", owner_paused=False)
    peer.owner_paused = True
    is_running = peer.is_running

    def deed(fleet: JourneyFleet) -> None:
        fleet.do_agent(name, "pause")
        if is_running:
            fleet.until_agent(name, "is paused", lambda told: told["state"] == "paused")

    return deed


@operation(lambda model: bool(model.peers_where(standing="enrolled", owner_paused=True)))
def resume_by_owner(model: Model, choose: Choose) -> Deed:
    name, peer = _choose_peer(model, choose, standing="enrolled", owner_paused=True)
    peer.owner_paused = peer.operator_paused = False
    is_running = peer.is_running

    def deed(fleet: JourneyFleet) -> None:
        fleet.do_agent(name, "resume")
        if is_running:
            fleet.until_agent(name, "works again", lambda told: told["state"] != "paused")

    return deed


@operation(lambda model: bool(model.peers_where(standing="enrolled")))
def change_owner_settings(model: Model, choose: Choose) -> Deed:
    name, _ = _choose_peer(model, choose, standing="enrolled")
    changes = (("cpu_share", "0.5"), ("cpu_share", "1"), ("log_level", "debug"))
    changes += (("log_level", "info"), ("share_log", "false"), ("idle_timeout_s", "2"))
    key, value = choose(changes)
    return lambda fleet: ignore(fleet.do_agent(name, "policy", "set", key, value))


@operation(lambda model: bool(model.peers_where(standing="enrolled")))
def leave(model: Model, choose: Choose) -> Deed:
    name, peer = _choose_peer(model, choose, standing="enrolled")
    _set_gone(peer)

    def deed(fleet: JourneyFleet) -> None:
        fleet.stop_agent(name)
        fleet.old.discard(name)
        fleet.do_agent(name, "leave", "--yes")

    return deed


@operation(lambda model: bool(model.peers_where(standing="gone")))
def join(model: Model, choose: Choose) -> Deed:
    """Join again with a new key; with approvals, the machine waits for one."""
    name, peer = _choose_peer(model, choose, standing="gone")
    peer.standing = "awaiting" if model.needs_approval else "enrolled"
    peer.joined += 1
    mqtt = model.has_broker
    if enrolled := not model.needs_approval:
        _set_running(peer, True)
    else:
        _set_running(peer, False)

    def deed(fleet: JourneyFleet) -> None:
        fleet.stop_agent(name)
        fleet.join_one(name)
        if enrolled:
            fleet.start_one(name, mqtt=mqtt)

    return deed


@operation(
    lambda model: (
        not model.needs_approval
        and bool(model.peers_where(standing="enrolled", is_running=True, is_old=False))
    )
)
def downgrade_agent(model: Model, choose: Choose) -> Deed:
    """An older agent joins with a key of its own: it signs requests that later agents do not."""
    name, peer = _choose_peer(model, choose, standing="enrolled", is_running=True, is_old=False)
    _set_running(peer, True)
    peer.is_old = True
    peer.joined += 1
    mqtt = model.has_broker

    def deed(fleet: JourneyFleet) -> None:
        fleet.stop_agent(name)
        fleet.do_agent(name, "leave", "--yes")
        fleet.told_before |= {entry.digest for entry in audit_log.read(fleet.folder / name)}
        shutil.rmtree(fleet.folder / name)  # older agents refuse a home of a newer format
        fleet.old.add(name)
        fleet.join_one(name)
        fleet.start_one(name, mqtt=mqtt)

    return deed


@operation(lambda model: bool(model.peers_where(standing="enrolled", is_running=True, is_old=True)))
def upgrade_agent(model: Model, choose: Choose) -> Deed:
    name, peer = _choose_peer(model, choose, standing="enrolled", is_running=True, is_old=True)
    _set_running(peer, True)
    peer.is_old = False
    mqtt = model.has_broker

    def deed(fleet: JourneyFleet) -> None:
        fleet.stop_agent(name)
        fleet.old.discard(name)
        fleet.start_one(name, mqtt=mqtt)

    return deed


# --- by the operator ---


def _reachable(model: Model) -> bool:
    """Commands travel over MQTT."""
    return model.has_broker and _working(model)


@operation(_reachable)
def pause_by_operator(model: Model, choose: Choose) -> Deed:
    name, peer = _choose_peer(model, choose, standing="enrolled", is_running=True)
    peer.operator_paused = True

    def deed(fleet: JourneyFleet) -> None:
        fleet.do("peers", "pause", name)
        fleet.until_agent(name, "is paused", lambda told: told["state"] == "paused")

    return deed


@operation(lambda model: model.has_broker and bool(model.peers_where(operator_paused=True)))
def resume_by_operator(model: Model, choose: Choose) -> Deed:
    name, peer = _choose_peer(model, choose, operator_paused=True)
    peer.operator_paused = False
    still = peer.owner_paused

    def deed(fleet: JourneyFleet) -> None:
        fleet.do("peers", "resume", name)
        fleet.until_agent(
            name,
            "obeys",
            lambda told: "operator" not in told["reason"] and (still or told["state"] != "paused"),
        )

    return deed


@operation(_reachable)
def drain(model: Model, choose: Choose) -> Deed:
    name, peer = _choose_peer(model, choose, standing="enrolled", is_running=True)
    _set_running(peer, False)

    def deed(fleet: JourneyFleet) -> None:
        fleet.note_family()
        fleet.do("peers", "drain", name, "--deadline", "60s")
        assert fleet.programs[name].wait(60) == 0

    return deed


@operation(lambda model: bool(model.enrolled))
def remove(model: Model, choose: Choose) -> Deed:
    """Remove a machine; its owner then ends its agent."""
    name, peer = _choose_peer(model, choose, standing="enrolled")
    _set_gone(peer)

    def deed(fleet: JourneyFleet) -> None:
        fleet.do("peers", "remove", name, "--yes")
        fleet.stop_agent(name)
        fleet.old.discard(name)

    return deed


@operation(lambda model: bool(model.peers_where(standing="awaiting")))
def approve(model: Model, choose: Choose) -> Deed:
    name, peer = _choose_peer(model, choose, standing="awaiting")
    peer.standing = "enrolled"
    _set_running(peer, True)
    mqtt = model.has_broker

    def deed(fleet: JourneyFleet) -> None:
        fleet.do("peers", "approve", name)
        fleet.start_one(name, mqtt=mqtt)

    return deed
