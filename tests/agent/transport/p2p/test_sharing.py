"""Versions from peer to peer, over real sockets: who gets what, and what hostile holders can do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from agent.transport.bandwidth import Bandwidth
from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.p2p import peer_client
from agent.transport.p2p.networks import LocalNetwork
from agent.transport.p2p.piece_store import PartialVersion, PieceStore
from agent.transport.p2p.server import MAX_CONNECTIONS_PER_ADDRESS, PeerServer
from agent.transport.p2p.sharing import Sharing
from agent.transport.version_store import VersionStore
from protocols.enrollment import certificates, identity
from protocols.errors import Unreachable
from protocols.local.atomic_files import write_private
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.network import addresses
from protocols.p2p import swarm
from protocols.p2p.gossip import GossipBatch, Neighbor
from protocols.p2p.swarm import (
    PIECE_BYTES,
    DownloadPlan,
    DownloadPlanRequest,
    DownloadToken,
    PieceSource,
)
from tests.support.https_site import HOST, Machine, Site
from tests.support.waiting import wait_for

#: Three pieces and a bit.
MODEL = Weights({"w": np.random.default_rng(7).standard_normal(820_000).astype(np.float32)})
SIZE = MODEL.nbytes + len(weights.header_bytes(MODEL.schema))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = tmp_path / "coordinator"
    folder.mkdir()
    with Site(folder).up() as up:
        up.lane.save(MODEL)
        yield up


@pytest.fixture
def digest(site: Site) -> str:
    return weights.digest(MODEL)


class Loop:
    """An event loop in a thread, for what an agent's loop would run."""

    def __enter__(self) -> Loop:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        return self

    def start(self, work: Callable[[], object]) -> None:
        asyncio.run_coroutine_threadsafe(work(), self._loop)  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        def end() -> None:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.call_later(0.2, self._loop.stop)

        self._loop.call_soon_threadsafe(end)
        self._thread.join()
        self._loop.close()


class Peer:
    """A machine that has joined and shares, with its cache of versions."""

    def __init__(self, site: Site, folder: Path, name: str, policy: str = "on") -> None:
        self.machine = site.enroll(name)
        home = folder / name
        home.mkdir()
        write_private(home / "node.key", identity.private_pem(self.machine.node_key))
        credentials = site.credentials(self.machine)
        self.sharing = Sharing(
            policy,  # type: ignore[arg-type]
            home,
            credentials,
            identity.public_bytes(site.sign_key),
        )
        self.bandwidth = Bandwidth(home)
        self.link = CoordinatorClient(credentials, self.bandwidth)
        self.folder = home / "cache"
        self.folder.mkdir()
        self.versions = VersionStore(
            self.folder, lambda: self.link, self.sharing, self.bandwidth.received
        )

    def fetch(self, digest: str) -> Path:
        return self.versions.fetch(digest, SIZE)


@contextmanager
def peers(site: Site, folder: Path, *names: str) -> Iterator[list[Peer]]:
    with Loop() as loop:
        made = [Peer(site, folder, name) for name in names]
        for peer in made:
            loop.start(peer.sharing.run)
        wait_for(lambda: all(peer.sharing.plan_request().address for peer in made))
        try:
            yield made
        finally:
            for peer in made:
                peer.link.close()


def test_a_version_crosses_the_coordinators_line_once(
    site: Site, tmp_path: Path, digest: str
) -> None:
    published: list[str] = []
    site.sharing.on_fetched = published.append
    with peers(site, tmp_path, "ann", "bob", "cyd") as fleet:
        for peer in fleet:
            assert weights.file_digest(peer.fetch(digest)) == digest
        assert site.transfer.bytes_down == SIZE
        assert sum(peer.sharing.bytes_sent for peer in fleet) == 2 * SIZE
        assert fleet[2].link.bytes_down == 0
        # The owner's caps count what came, from wherever.
        assert [peer.bandwidth.today() for peer in fleet] == [(0, SIZE)] * 3
        # The monitor shows who passed the version on.
        ann, bob, cyd = (peer.machine.peer for peer in fleet)
        assert published == [bob, cyd]
        assert site.sharing.fetched_from(ann) == {}
        assert site.sharing.fetched_from(bob).keys() == {ann}
        assert site.sharing.fetched_from(cyd).keys() <= {ann, bob}


def test_a_peer_passes_on_no_more_than_its_owner_allows_a_day(
    site: Site, tmp_path: Path, digest: str
) -> None:
    with peers(site, tmp_path, "ann", "bob") as (ann, bob):
        left = 3 * PIECE_BYTES

        def may_pass_on(nbytes: int) -> bool:
            nonlocal left
            left -= nbytes
            return left >= 0

        ann.fetch(digest)
        ann.sharing.may_pass_on = may_pass_on
        assert weights.file_digest(bob.fetch(digest)) == digest
        assert 0 < ann.sharing.bytes_sent <= 3 * PIECE_BYTES
        assert bob.link.bytes_down == SIZE - ann.sharing.bytes_sent, "the rest is the coordinator's"


def test_who_is_still_fetching_passes_on_what_has_come(
    site: Site, tmp_path: Path, digest: str
) -> None:
    with peers(site, tmp_path, "ann", "bob") as (ann, bob):
        halfway, go_on = threading.Event(), threading.Event()
        stream = ann.link.stream

        def slowly(asked: str, start: int, stop: int, replica: None) -> Iterator[bytes]:
            for number, data in enumerate(stream(asked, start, stop, replica)):
                if number == 2:
                    halfway.set()
                    assert go_on.wait(30)
                yield data

        ann.link.stream = slowly  # type: ignore[method-assign]
        first = threading.Thread(target=ann.fetch, args=(digest,))
        first.start()
        assert halfway.wait(30)
        second = threading.Thread(target=bob.fetch, args=(digest,))
        second.start()
        wait_for(lambda: ann.sharing.bytes_sent > 0)
        go_on.set()
        first.join(30)
        second.join(30)
        assert weights.file_digest(bob.folder / f"{digest}.safetensors") == digest
        assert site.transfer.bytes_down == SIZE


def test_a_cut_download_goes_on_with_the_pieces_that_it_has(
    site: Site, tmp_path: Path, digest: str
) -> None:
    with peers(site, tmp_path, "ann") as (ann,):
        whole = site.lane.version_path(digest).read_bytes()
        left = bytearray(SIZE)
        left[: 2 * PIECE_BYTES] = whole[: 2 * PIECE_BYTES]
        left[PIECE_BYTES + 5] ^= 1  # and the second was spoilt
        (ann.folder / f"{digest}.pieces").write_bytes(left)
        assert weights.file_digest(ann.fetch(digest)) == digest
        assert site.transfer.bytes_down == SIZE - PIECE_BYTES


@pytest.mark.parametrize("wrong", ["bytes", "endless", "short", "silent", "refusing", "slow head"])
def test_a_hostile_holder_costs_time_only(
    site: Site, tmp_path: Path, digest: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.transport.p2p.peer_download.PIECE_S", 1.0)
    with peers(site, tmp_path, "ann") as (ann,), hostile_holder(site, tmp_path, wrong) as rogue:
        machine, address = rogue
        asked = DownloadPlanRequest(
            address=address, networks=("127.0.0.0/8",), serves_other_networks=True
        )
        site.holders.plan_fetch(digest, machine.peer, asked, HOST, time.monotonic())
        site.holders.record_complete(digest, machine.peer, {}, ())
        assert weights.file_digest(ann.fetch(digest)) == digest
        again = DownloadPlanRequest(address="", networks=("127.0.0.0/8",), faulty=())
        site.holders.record_complete(digest, "another", {}, (machine.peer,))
        assert machine.peer not in dict(
            site.holders.plan_fetch(digest, "third", again, HOST, time.monotonic()).sources
        ), "the first complaint was told"


def test_a_silent_peer_is_given_up_by_a_round_of_gossip(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the limit for the whole request."""
    monkeypatch.setattr(peer_client, "STALL_S", 0.1)
    with hostile_holder(site, tmp_path, "silent") as (machine, address):
        public, ann = identity.node_public_pem(machine.node_key), site.enroll("ann")
        neighbor = Neighbor(peer=machine.peer, name="rogue", address=address, node_public=public)
        client = peer_client.PeerClient(neighbor, b"", site.credentials(ann))
        with pytest.raises(Unreachable, match="no answer in time"):
            client.exchange_gossip(GossipBatch())


def test_somebody_else_at_a_holders_address_gets_not_a_word(
    site: Site, tmp_path: Path, digest: str
) -> None:
    with peers(site, tmp_path, "ann") as (ann,), hostile_holder(site, tmp_path, "bytes") as rogue:
        _, address = rogue
        victim = site.enroll("victim")  # whose key the rogue has not
        asked = DownloadPlanRequest(
            address=address, networks=("127.0.0.0/8",), serves_other_networks=True
        )
        site.holders.plan_fetch(digest, victim.peer, asked, HOST, time.monotonic())
        assert weights.file_digest(ann.fetch(digest)) == digest
        assert hostile_heads == []


hostile_heads: list[bytes] = []


@contextmanager
def hostile_holder(site: Site, folder: Path, wrong: str) -> Iterator[tuple[Machine, str]]:
    """An enrolled machine whose server answers every request in a wrong way."""
    machine = site.enroll("rogue")
    write_private(folder / "rogue.key", identity.private_pem(machine.node_key))
    write_private(folder / "rogue.pem", certificates.new_node_tls(machine.node_key, machine.peer))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "rogue.pem", folder / "rogue.key")
    hostile_heads.clear()
    ending = threading.Event()
    head = b"HTTP/1.1 206 Partial Content\r\ncontent-length: %d\r\n\r\n"

    def answer(raw: socket.socket) -> None:
        with contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True) as call:
            call.settimeout(20)
            while request := call.recv(65536):
                hostile_heads.append(request)
                match wrong:
                    case "bytes":
                        call.sendall(head % PIECE_BYTES + bytes(PIECE_BYTES))
                    case "endless":
                        call.sendall(b"HTTP/1.1 206 Partial Content\r\n\r\n")
                        while not ending.is_set():
                            call.sendall(bytes(65536))
                    case "short":
                        call.sendall(head % PIECE_BYTES + bytes(1000))
                        return
                    case "silent":
                        ending.wait(20)
                    case "refusing":
                        call.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                    case "slow head":
                        while not ending.wait(0.05):
                            call.sendall(b"H")

    with socket.create_server((HOST, 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    caller, _ = listener.accept()
                    threading.Thread(target=answer, args=(caller,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield machine, f"{HOST}:{listener.getsockname()[1]}"
        finally:
            ending.set()
            listener.shutdown(socket.SHUT_RDWR)


def permit_of(site: Site, who: Machine, digest: str, until_s: float = 60.0) -> str:
    permit = DownloadToken(
        peer=who.peer,
        sign_public=identity.public_bytes(who.sign_key),
        digest=digest,
        until=time.time() + until_s,
    )
    return b64encode(swarm.SIGNED_DOWNLOAD_TOKEN.pack(permit, site.sign_key.sign)).decode()


def test_a_holder_serves_only_who_has_a_permit_and_signs(
    site: Site, tmp_path: Path, digest: str
) -> None:
    with peers(site, tmp_path, "ann") as (ann,):
        ann.fetch(digest)
        bob, stranger = site.enroll("bob"), Machine("stranger")
        bob.fleet = stranger.fleet = ann.machine.peer  # the receiver
        path = f"/cw/v1/weights/{digest}"
        address = ann.sharing.plan_request().address
        good = bob.headers("GET", path) | {
            swarm.DOWNLOAD_TOKEN_HEADER: permit_of(site, bob, digest)
        }
        with httpx.Client(base_url=f"https://{address}", verify=False) as http:
            assert (
                http.get(path, headers=good).content == site.lane.version_path(digest).read_bytes()
            )

            def refused(headers: dict[str, str], method: str = "GET", where: str = path) -> bool:
                answer = http.request(method, where, headers=headers)
                return answer.status_code in (401, 404, 503) and not answer.content

            assert refused(good), "a request counts once"
            assert refused({})
            assert refused(bob.headers("GET", path))
            assert refused(
                stranger.headers("GET", path)
                | {swarm.DOWNLOAD_TOKEN_HEADER: permit_of(site, bob, digest)}
            )
            own = Site.__new__(Site)
            own.sign_key = identity.new_signing_key()
            forged = permit_of(own, bob, digest)
            assert refused(bob.headers("GET", path) | {swarm.DOWNLOAD_TOKEN_HEADER: forged})
            late = permit_of(site, bob, digest, until_s=-1)
            assert refused(bob.headers("GET", path) | {swarm.DOWNLOAD_TOKEN_HEADER: late})
            other = permit_of(site, bob, "1" * 64)
            assert refused(bob.headers("GET", path) | {swarm.DOWNLOAD_TOKEN_HEADER: other})
            elsewhere = path.replace("weights", "updates")
            permit = {swarm.DOWNLOAD_TOKEN_HEADER: permit_of(site, bob, digest)}
            assert refused(bob.headers("GET", elsewhere) | permit, where=elsewhere)
            assert refused(bob.headers("PUT", path) | permit, method="PUT")
            unknown = f"/cw/v1/weights/{'2' * 64}"
            assert refused(
                bob.headers("GET", unknown)
                | {swarm.DOWNLOAD_TOKEN_HEADER: permit_of(site, bob, "2" * 64)},
                where=unknown,
            )


def test_a_refusal_comes_after_the_body(site: Site, tmp_path: Path, digest: str) -> None:
    """Told before it, the answer would be lost with the bytes that nobody reads."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with peers(site, tmp_path, "ann") as (ann,):
        host, _, port = ann.sharing.plan_request().address.rpartition(":")
        with context.wrap_socket(socket.create_connection((host, int(port)))) as caller:
            caller.sendall(b"POST /cw/v1/words HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n")
            caller.settimeout(0.3)
            with pytest.raises(TimeoutError):
                caller.recv(1)
            caller.sendall(b"word")
            caller.settimeout(30)
            assert caller.recv(64).startswith(b"HTTP/1.1 401 ")


def test_one_address_holds_a_few_connections(site: Site, tmp_path: Path, digest: str) -> None:
    with peers(site, tmp_path, "ann") as (ann,):
        host, _, port = ann.sharing.plan_request().address.rpartition(":")
        callers = [
            socket.create_connection((host, int(port)))
            for _ in range(MAX_CONNECTIONS_PER_ADDRESS + 3)
        ]
        for caller in callers:
            caller.settimeout(0.05)

        def closed() -> int:
            count = 0
            for caller in callers:
                with contextlib.suppress(TimeoutError, OSError):
                    count += caller.recv(1) == b""
            return count

        wait_for(lambda: closed() == 3)
        for caller in callers:
            caller.close()
        # And those that said nothing have made room again.
        wait_for(lambda: _served(site, ann, digest))


def _served(site: Site, ann: Peer, digest: str) -> bool:
    ann.fetch(digest)
    bob = site.enroll("bob")
    bob.fleet = ann.machine.peer  # the receiver
    path = f"/cw/v1/weights/{digest}"
    headers = bob.headers("GET", path) | {swarm.DOWNLOAD_TOKEN_HEADER: permit_of(site, bob, digest)}
    try:
        answer = httpx.get(
            f"https://{ann.sharing.plan_request().address}{path}", headers=headers, verify=False
        )
    except httpx.HTTPError:
        return False
    return len(answer.content) == SIZE


@pytest.mark.parametrize(
    ("policy", "host", "listens"),
    [
        ("off", "192.168.1.5", False),
        ("lan", "192.168.1.5", True),
        ("lan", "8.8.4.4", False),
        ("lan", "127.0.0.1", False),
        ("lan", "169.254.0.1", False),
        ("on", "8.8.4.4", True),
    ],
)
async def test_nothing_listens_unless_the_owner_lets_it(
    tmp_path: Path, policy: str, host: str, listens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    site = Site(tmp_path / "site")
    bound: list[str] = []

    def listen(self: PeerServer, host: str, port: int) -> int:
        bound.append(host)
        raise OSError("not ours")

    monkeypatch.setattr(PeerServer, "listen", listen)
    monkeypatch.setattr(
        "agent.transport.p2p.sharing.locate", lambda *_: LocalNetwork(host, (f"{host}/24",))
    )
    peer = Peer(site, tmp_path, "ann", policy)
    running = asyncio.create_task(peer.sharing.run())
    for _ in range(100):
        await asyncio.sleep(0.005)
        if bound or running.done():
            break
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert bound == ([host] if listens else [])
    assert not peer.sharing.is_large_enough(SIZE)
    peer.link.close()
    site.ledger.close()


def test_a_plan_must_fit_the_version(digest: str) -> None:
    pieces = bytes(32 * swarm.num_pieces(SIZE))
    good = DownloadPlan(digest=digest, nbytes=SIZE, piece_bytes=PIECE_BYTES, pieces=pieces)
    swarm.check_plan(good, digest, SIZE)
    for wrong in (
        DownloadPlan(digest="0" * 64, nbytes=SIZE, piece_bytes=PIECE_BYTES, pieces=pieces),
        DownloadPlan(digest=digest, nbytes=SIZE + 1, piece_bytes=PIECE_BYTES, pieces=pieces),
        DownloadPlan(digest=digest, nbytes=SIZE, piece_bytes=PIECE_BYTES, pieces=pieces[:-1]),
    ):
        with pytest.raises(swarm.BadMessage):
            swarm.check_plan(wrong, digest, SIZE)
    assert PieceSource(
        peer="p", address=addresses.netloc("fe80::1", 5), node_public=b""
    ).address == ("[fe80::1]:5")


def test_a_version_that_comes_another_way_leaves_its_download_intact(
    tmp_path: Path, digest: str
) -> None:
    """Gossip may bring it first: others are served from that file then."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    weights.save(MODEL, whole)
    data = whole.read_bytes()
    pieces = [data[at : at + PIECE_BYTES] for at in range(0, SIZE, PIECE_BYTES)]
    plan = DownloadPlan(
        digest=digest, nbytes=SIZE, piece_bytes=PIECE_BYTES, pieces=swarm.piece_digests(pieces)
    )
    part.touch()
    store, partial = PieceStore(), PartialVersion(part, plan)
    store.add(digest, partial)
    assert partial.put(0, pieces[0])
    assert not partial.put(1, pieces[0])
    assert partial.missing == {1, 2, 3}
    store.put(digest, whole)
    assert [partial.put(piece, pieces[piece]) for piece in (1, 2, 3)] == [True] * 3
    partial.sync()
    partial.end_writing()
    assert weights.file_digest(part) == digest
    store.drop(digest)
