"""Operations on the coordinator, its broker and its tickets."""

from __future__ import annotations

import shutil

from tests.journeys.fleet import JourneyFleet
from tests.journeys.model import NAMES, Backup, Model
from tests.journeys.operations import Choose, Deed, operation
from tests.support.waiting import wait_for


@operation(lambda model: model.has_broker)
def restart_coordinator(model: Model, choose: Choose) -> Deed:
    def deed(fleet: JourneyFleet) -> None:
        fleet.lower()
        fleet.rise()

    return deed


@operation(lambda model: model.has_broker)
def kill_coordinator(model: Model, choose: Choose) -> Deed:
    def deed(fleet: JourneyFleet) -> None:
        fleet.lower(kill=True)
        fleet.rise()

    return deed


@operation(lambda model: model.has_broker)
def change_coordinator_settings(model: Model, choose: Choose) -> Deed:
    model.needs_approval = approve = not model.needs_approval

    def deed(fleet: JourneyFleet) -> None:
        (fleet.home / "settings.toml").write_text(f"approve = {str(approve).lower()}\n")
        fleet.lower()
        fleet.rise()

    return deed


@operation(lambda model: True)
def back_up(model: Model, choose: Choose) -> Deed:
    states = [(run, str(run.state)) for run in model.runs]
    model.backup = backup = Backup(model.keys, states, model.needs_approval)

    def deed(fleet: JourneyFleet) -> None:
        backup.file = fleet.backups / f"{fleet.new_number()}.backup"
        fleet.do("backup", str(backup.file), "--with-versions")

    return deed


def _can_go_back(model: Model) -> bool:
    """True if no machine has joined, left or been removed since the backup."""
    return model.has_broker and model.backup is not None and model.backup.keys == model.keys


@operation(_can_go_back)
def restore_older_backup(model: Model, choose: Choose) -> Deed:
    """Lose the home of the coordinator, and go back to the last backup."""
    backup = model.backup
    assert backup is not None
    model.needs_approval = backup.needs_approval
    model.runs = [run for run, _ in backup.runs]
    for run, state in backup.runs:
        run.state = state  # type: ignore[assignment]
    from_peers = choose(("versions of the backup", "versions of the peers"))

    def deed(fleet: JourneyFleet) -> None:
        fleet.lower()
        shutil.rmtree(fleet.home)
        fleet.do(
            "restore",
            str(backup.file),
            *(["--from-peers"] if from_peers == "versions of the peers" else []),
        )
        fleet.forget()
        fleet.rise()

    return deed


@operation(lambda model: model.has_broker)
def restore_coordinator(model: Model, choose: Choose) -> Deed:
    """Lose the home of the coordinator, and restore it from a backup of that moment."""

    def deed(fleet: JourneyFleet) -> None:
        file = fleet.backups / f"{fleet.new_number()}.backup"
        fleet.lower()
        fleet.do("backup", str(file), "--with-versions")
        shutil.rmtree(fleet.home)
        fleet.do("restore", str(file))
        fleet.rise()

    return deed


@operation(lambda model: model.has_broker)
def take_broker_away(model: Model, choose: Choose) -> Deed:
    model.has_broker = False

    def deed(fleet: JourneyFleet) -> None:
        fleet.take_broker_away()
        wait_for(lambda: not fleet.client().fleet().links.mqtt, "the coordinator notices")

    return deed


@operation(lambda model: not model.has_broker)
def bring_broker_back(model: Model, choose: Choose) -> Deed:
    model.has_broker = True

    def deed(fleet: JourneyFleet) -> None:
        fleet.bring_broker_back()
        wait_for(lambda: fleet.client().fleet().links.mqtt, "the coordinator has its broker")

    return deed


@operation(lambda model: model.has_broker)
def kill_broker(model: Model, choose: Choose) -> Deed:
    def deed(fleet: JourneyFleet) -> None:
        broker = fleet.broker()
        assert broker is not None
        broker.kill()
        wait_for(lambda: fleet.broker() not in (None, broker), "another broker")

    return deed


@operation(lambda model: True)
def look_at_everything(model: Model, choose: Choose) -> Deed:
    """Each command that shows something; the three that list peers list the same ones."""
    known = {name for name, peer in model.peers.items() if peer.standing != "gone"}
    running = model.peers_where(standing="enrolled", is_running=True)

    def deed(fleet: JourneyFleet) -> None:
        for words in (("status",), ("monitor", "--once"), ("peers", "list")):
            lines = [line for line in fleet.do(*words).splitlines() if "removed" not in line]
            shown = {name for name in NAMES if any(f"{name} " in line for line in lines)}
            assert shown == known, (words, lines)
        for words in (("run", "list"), ("job", "list"), ("models", "list"), ("ticket", "list")):
            fleet.do(*words)
        fleet.do("audit")
        fleet.do("audit", "verify")
        for name in running:
            fleet.do_agent(name, "status")
            fleet.do_agent(name, "ledger")

    return deed


@operation(lambda model: True)
def create_and_revoke_ticket(model: Model, choose: Choose) -> Deed:
    def deed(fleet: JourneyFleet) -> None:
        before = {ticket["id"] for ticket in fleet.data("ticket", "list")}
        ticket = fleet.ticket()
        (new,) = {one["id"] for one in fleet.data("ticket", "list")} - before
        fleet.do("ticket", "revoke", new)
        refused = fleet.ask_agent("stranger", "join", "-", "--name", "stranger", given=ticket)
        assert refused.returncode != 0
        assert "revoked" in refused.stderr, refused.stderr

    return deed
