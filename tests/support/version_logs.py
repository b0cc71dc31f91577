"""Coordinators' logs over real ledgers, and agents that follow them, without a network."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

from agent.home.credentials import Credentials
from agent.home.enrollment_file import Enrollment, write_enrollment
from agent.transport.followed_log import FollowedLog, Witnesses
from coordinator.fleet.registry import Registry
from coordinator.storage import run_events
from coordinator.storage.fleet_cards import CardFile
from coordinator.storage.run_events import RunSpec
from coordinator.storage.sqlite_ledger import SqliteLedger
from coordinator.storage.version_log import VersionLog
from protocols.enrollment import certificates, identity
from protocols.enrollment.certificates import NodeCertificate
from protocols.enrollment.identity import SigningKey
from protocols.messages import version_log as wire
from protocols.messages.mqtt import MqttAddress
from protocols.messages.version_log import LogNews
from protocols.messages.work import Work
from tests.support.https_site import HOST, Machine, Site

RUN = "ping-abc123"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Authority:
    """The CA of a fleet, and the signing key of its coordinator with its card."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ca_key, self.ca_pem = certificates.new_ca("test")
        self.fleet = certificates.fleet_id(self.ca_pem)
        self._cards = CardFile(folder, self.ca_pem)
        self.replace_key(identity.new_signing_key())

    def replace_key(self, key: SigningKey) -> None:
        self.sign_key, self.public = key, identity.public_bytes(key)
        mqtt = MqttAddress(host=HOST, port=1)
        self.card = self._cards.current(self.ca_key, self.public, mqtt)


class SiteAuthority(Authority):
    """That of a running site."""

    def __init__(self, site: Site) -> None:
        self.ca_key, self.ca_pem, self.fleet = site.ca_key, site.ca_pem, site.fleet_id
        self.sign_key, self.public = site.sign_key, site.identity.public
        self.card = site.fleet_card()


class Shown:
    """The log that a coordinator shows: its ledger is in `folder`."""

    def __init__(self, authority: Authority, folder: Path) -> None:
        self.authority, self.folder = authority, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.ledger = SqliteLedger(folder / "ledger.db")
        self.log = VersionLog(self.ledger, authority.fleet, authority.sign_key.sign)

    def copy(self, folder: Path) -> Shown:
        """The same history, which may go on otherwise: a home that was copied."""
        self.ledger.close()
        shutil.copytree(self.folder, folder)
        self.ledger = SqliteLedger(self.folder / "ledger.db")
        self.log = VersionLog(self.ledger, self.authority.fleet, self.authority.sign_key.sign)
        return Shown(self.authority, folder)

    def start(self, run: str = RUN) -> None:
        self._append(run_events.RunStarted(RunSpec(task="ping", rounds=9), time.time()), run)
        self._append(run_events.WeightsInitialised(digest("first"), "file"), run)

    def version(self, number: int, text: str = "", run: str = RUN) -> None:
        made = digest(text or f"version {number}")
        self._append(run_events.VersionCommitted(number, made, digest("?"), (), {}), run)

    def versions(self, first: int, last: int) -> None:
        """Make these versions at once."""
        made = [
            run_events.VersionCommitted(number, digest(f"version {number}"), digest("?"), (), {})
            for number in range(first, last + 1)
        ]
        self.ledger.append(RUN, [run_events.encode(event) for event in made])

    def take_back(self, lost: str, to: str, run: str = RUN) -> None:
        self._append(run_events.VersionLost(digest(lost), digest(to)), run)

    def restore(self, entries: int = 0) -> None:
        Registry(self.ledger).record_restore(entries, time.time())

    def _append(self, event: run_events.RunEvent, run: str) -> None:
        self.ledger.append(run, [run_events.encode(event)])

    def work(self, number: int, text: str = "", run: str = RUN) -> Work:
        """Training that starts from this version."""
        base = digest(text or (f"version {number}" if number else "first"))
        return Work(run=run, round=number + 1, kind="train", task="ping", base=base, nbytes=1)

    def news(self, *seen: bytes) -> LogNews:
        tail = self.log.head()
        return LogNews(head=tail.head, page=tail.page, seen=seen)

    def close(self) -> None:
        self.ledger.close()


class Follower:
    """An agent that follows the log of `shown`, which may be exchanged."""

    def __init__(
        self, authority: Authority, folder: Path, shown: Shown, machine: Machine | None = None
    ) -> None:
        self.authority, self.home, self.shown = authority, folder, shown
        folder.mkdir(parents=True, exist_ok=True)
        self.machine = machine = machine or Machine(folder.name)
        certificate = certificates.issue_certificate(
            authority.ca_key,
            NodeCertificate(
                fleet=authority.fleet,
                peer=machine.peer,
                name=machine.name,
                sign_public=identity.public_bytes(machine.sign_key),
                node_public=identity.node_public_pem(machine.node_key),
                not_after=time.time() + 3600,
            ),
        )
        self.enrollment = Enrollment(
            peer=machine.peer,
            name=machine.name,
            fleet=authority.fleet,
            addresses=(f"{HOST}:1",),
            ca_pem=authority.ca_pem.decode(),
            certificate=certificate,
            coordinator_public=authority.public,
            mqtt=MqttAddress(host=HOST, port=1),
            card=authority.card,
        )
        write_enrollment(folder, self.enrollment)
        self.forks: list[str] = []
        self.notes: list[str] = []
        self.pages = 0
        self.witnesses = Witnesses()
        self.open()

    def open(self) -> None:
        """Start, or start again after a stop."""
        credentials = Credentials(
            f"{HOST}:1",
            self.authority.ca_pem,
            self.machine.peer,
            self.machine.node_key,
            self.machine.sign_key,
            self.authority.fleet,
        )
        self.log = FollowedLog(
            self.home, self.enrollment, credentials, self._page, lambda: self.enrollment.certificate
        )
        self.log.on_fork, self.log.on_note = self.forks.append, self.notes.append
        self.log.witnesses = lambda: self.witnesses

    def restart(self) -> None:
        self.log.close()
        self.open()

    def _page(self, start: int) -> bytes:
        self.pages += 1
        return self.shown.log.page(start)

    def check(self, work: Work) -> None:
        """Take work, as `agent.clientapp` does before it trains."""
        tail = self.shown.log.head()
        self.log.check_work(work, tail.head, tail.page)

    def train(self, number: int, text: str = "", run: str = RUN) -> None:
        self.check(self.shown.work(number, text, run))

    def hear(self, *others: Follower) -> None:
        """Get what other peers have seen, as by gossip."""
        for other in others:
            self.log.offer(other.log.seen())
        self.log.process()

    @property
    def proof(self) -> Path:
        (path,) = (self.home / "proofs").glob("*.json")
        return path


def page_of(shown: Shown, start: int) -> wire.LogPage:
    return wire.decode_page(shown.log.page(start))
