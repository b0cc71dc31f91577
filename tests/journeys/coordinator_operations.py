"""Operations on the coordinator, its broker and its tickets."""

from __future__ import annotations

import shutil

from tests.journeys.fleet import JourneyFleet
from tests.journeys.model import Model
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
    with_versions = choose((True, False))

    def deed(fleet: JourneyFleet) -> None:
        out = fleet.new_file(".backup")
        fleet.do("backup", str(out), *(["--with-versions"] if with_versions else []))
        out.unlink()

    return deed


@operation(lambda model: model.has_broker and bool(model.available))
def restore_coordinator(model: Model, choose: Choose) -> Deed:
    """Lose the home of the coordinator, and restore it from a backup of that moment."""

    def deed(fleet: JourneyFleet) -> None:
        out = fleet.new_file(".backup")
        fleet.lower()
        fleet.do("backup", str(out), "--with-versions")
        lost = fleet.new_file(".lost")
        fleet.home.rename(lost)
        fleet.do("restore", str(out))
        fleet.rise()
        out.unlink()
        shutil.rmtree(lost)

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
