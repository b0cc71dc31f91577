"""The agent's link: sessions, lost and opened again, and every failure as one of our errors."""

from __future__ import annotations

import errno
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable import inflatable_object
from flwr.supercore.task_identity import TaskIdentity

from agent.home.credentials import Credentials
from agent.transport.connection import Connection, is_readable
from agent.transport.coordinator_client import CoordinatorClient, pack_message, unpack_message
from agent.transport.weight_transfer import IDLE_CONNECTION_S, CoordinatorDiskFull, SessionLost
from protocols.enrollment import certificates, identity
from protocols.errors import ExitCode, Refused, Unreachable, UploadRefused, UploadUnneeded
from protocols.local.join_client import is_other_ca
from protocols.messages.work import INLINE_MAX_BYTES
from protocols.model import weights
from tests.support.fault_proxy import Fault, Proxy
from tests.support.https_site import HOST, Machine, Site
from tests.support.waiting import wait_for


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("site"), flower=True).up() as running:
        yield running


def test_a_session_is_opened_kept_and_closed(
    site: Site, machine: Machine, link: CoordinatorClient
) -> None:
    node = site.nodes[machine.peer]
    assert node not in site.superlink.online_nodes()
    link.open()
    link.heartbeat()
    assert node in site.superlink.online_nodes()
    link.close()
    assert node not in site.superlink.online_nodes()


def test_a_new_life_opens_a_session_over_its_last_ones(site: Site, machine: Machine) -> None:
    """An agent that was killed said no goodbye."""
    first, second = (CoordinatorClient(site.credentials(machine)) for _ in range(2))
    first.open()
    second.open()
    second.heartbeat()
    second.close()
    first.close()


def test_without_a_session_nothing_is_asked_of_flower(link: CoordinatorClient) -> None:
    link.close()  # nothing to say goodbye to


def test_a_coordinator_that_forgot_us_means_a_lost_session(
    site: Site, machine: Machine, link: CoordinatorClient
) -> None:
    link.open()
    site.superlink.remove_node(site.nodes[machine.peer])
    with pytest.raises(SessionLost):
        link.heartbeat()
    with pytest.raises(SessionLost):
        link.open()


def test_an_agent_that_was_downgraded_reads_what_to_do(site: Site, link: CoordinatorClient) -> None:
    """The coordinator does not take the older format of signatures any more from a peer."""
    link.name_receiver(site.fleet_id)
    link.enrollment_status()
    link.name_receiver("")
    with pytest.raises(SessionLost, match=r"answered 401: .*Upgrade it again, .* --replace"):
        link.enrollment_status()


def test_a_lost_session_is_a_refusal_to_a_person() -> None:
    assert issubclass(SessionLost, Refused)
    assert SessionLost("x").exit_code is ExitCode.REFUSED


def closed_port() -> str:
    with socket.create_server((HOST, 0)) as taken:
        return f"{HOST}:{taken.getsockname()[1]}"


def elsewhere(site: Site, machine: Machine, address: str) -> CoordinatorClient:
    return CoordinatorClient(site.credentials(machine)._replace(address=address))


def test_the_next_address_is_tried_and_stays_the_first(site: Site, machine: Machine) -> None:
    """The first one refuses; the last one would never answer."""
    known, refuses = site.credentials(machine), closed_port()
    with socket.create_server((HOST, 0)) as silent:
        last = f"{HOST}:{silent.getsockname()[1]}"
        link = CoordinatorClient(known._replace(address=refuses, others=(known.address, last)))
        link.open()
        assert link.places == (known.address, refuses, last)
        link.heartbeat()
        link.close()


def test_without_any_address_that_answers_the_first_one_tells_why(
    site: Site, machine: Machine
) -> None:
    known = site.credentials(machine)
    link = CoordinatorClient(known._replace(address=closed_port(), others=("no.invalid:1",)))
    with pytest.raises(Unreachable, match="nothing listens"):
        link.open()
    _, other_ca = certificates.new_ca("other")
    other = known._replace(address=closed_port(), ca_pem=other_ca, others=(known.address,))
    with pytest.raises(Unreachable) as caught:
        CoordinatorClient(other).open()
    assert is_other_ca(caught.value), "so that the agent asks for the chain of the new CA"


def check_unreachable(link: CoordinatorClient, tmp_path: Path) -> None:
    message = Message(RecordDict({"config": ConfigRecord()}), 1, "train")
    update = tmp_path / "update"
    update.write_bytes(b"x")
    for ask in (
        link.open,
        link.pull,
        lambda: link.push(Message(RecordDict(), reply_to=message)),
        lambda: link.download("0" * 64, 10, tmp_path / "version"),
        lambda: link.upload("0" * 64, update),
    ):
        with pytest.raises(Unreachable) as caught:
            ask()
        assert caught.value.message
    link.close()


def test_nobody_there(site: Site, machine: Machine, tmp_path: Path) -> None:
    check_unreachable(elsewhere(site, machine, closed_port()), tmp_path)


def test_somebody_elses_certificate(site: Site, machine: Machine, tmp_path: Path) -> None:
    _, other_ca = certificates.new_ca("other")
    link = CoordinatorClient(site.credentials(machine)._replace(ca_pem=other_ca))
    check_unreachable(link, tmp_path)


@contextmanager
def answering(site: Site, answer: bytes) -> Iterator[str]:
    """A TLS server that gives this answer to whatever comes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(site.folder / "server.pem", site.folder / "server.key")
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    plain, _ = listener.accept()
                except OSError:
                    return
                try:
                    with context.wrap_socket(plain, server_side=True) as secure:
                        secure.recv(65536)
                        secure.sendall(answer)
                except OSError:
                    continue

        serving = threading.Thread(target=serve)
        serving.start()
        try:
            yield f"{HOST}:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
    serving.join()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"220 mail.example ESMTP\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\nconnection: close\r\n\r\njunk",
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\nconnection: close\r\n\r\nshort",
        b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        b"HTTP/1.1 409 Conflict\r\ncontent-length: 2\r\nconnection: close\r\n\r\n[]",
        b"HTTP/1.1 302 Found\r\nlocation: https://elsewhere.invalid/\r\ncontent-length: 0\r\n\r\n",
    ],
    ids=lambda answer: answer[:12].decode() or "nothing",
)
def test_nonsense_is_an_error_of_ours(
    site: Site, machine: Machine, tmp_path: Path, answer: bytes
) -> None:
    """Also from a proxy in between: an agent that met any other error would end."""
    with answering(site, answer) as address:
        link = elsewhere(site, machine, address)
        for ask in (
            link.open,
            link.pull,
            lambda: link.download("0" * 64, 10, tmp_path / "version"),
        ):
            with pytest.raises((Unreachable, Refused)):
                ask()
        update = tmp_path / "update"
        digest = weights.save(weights.Weights({}), update)
        if b"200 OK" not in answer:
            with pytest.raises((Unreachable, Refused)):
                link.upload(digest, update)
        link.close()


def _arrived(
    site: Site, machine: Machine, folder: Path, data: bytes, nbytes: int
) -> tuple[Path, str, Path]:
    """An update whose first bytes have arrived: its file, its digest, and the part at the site."""
    source = folder / "update"
    source.write_bytes(data)
    digest = weights.file_digest(source)
    part = site.folder / "spool" / f"{machine.peer}-{digest}.part"
    part.write_bytes(data[:nbytes])
    return source, digest, part


def test_a_cut_upload_goes_on_where_it_was_cut(
    site: Site, machine: Machine, link: CoordinatorClient, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 2000
    source, digest, _ = _arrived(site, machine, tmp_path, data, 300_000)
    link._last_upload = digest
    before = site.transfer.bytes_up
    link.upload(digest, source)
    assert site.transfer.bytes_up - before == len(data) - 300_000 == link.bytes_up
    stored = site.folder / "spool" / f"{machine.peer}-{digest}.safetensors"
    assert stored.read_bytes() == data


@pytest.fixture
def _large(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.transfer.limits, "max_bytes", 1 << 24)


@pytest.mark.usefixtures("_large")
def test_a_restarted_agent_sends_the_rest_of_an_update(
    site: Site, machine: Machine, link: CoordinatorClient, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 8192
    source, digest, _ = _arrived(site, machine, tmp_path, data, 1_500_000)
    before = site.transfer.bytes_up
    link.upload(digest, source)
    assert site.transfer.bytes_up - before == len(data) - 1_500_000 == link.bytes_up
    link.upload(digest, source)  # it is stored: nothing is sent
    assert site.transfer.bytes_up - before == link.bytes_up == len(data) - 1_500_000


@pytest.mark.usefixtures("_large")
def test_what_came_after_the_question_is_sent_again(
    site: Site, machine: Machine, link: CoordinatorClient, tmp_path: Path
) -> None:
    """The connection that was cut still brought some: all of the rest would be refused for it."""
    data = bytes(range(256)) * 8192
    source, digest, part = _arrived(site, machine, tmp_path, data, 1_000_000)
    pieces = link._pieces

    def later(path: Path, offset: int) -> Iterator[bytes]:
        if offset == 1_000_000:
            part.write_bytes(data[:1_300_000])
        return pieces(path, offset)

    link._pieces = later  # type: ignore[method-assign]
    link.upload(digest, source)
    assert site.lane.uploads.path(machine.peer, digest).read_bytes() == data
    assert link.bytes_up == len(data) - 1_000_000


def _has_answer(connection: Connection) -> bool:
    return is_readable(connection.sock)


@pytest.mark.usefixtures("_large")
def test_an_upload_ends_with_its_run(
    site: Site, link: CoordinatorClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "update"
    source.write_bytes(bytes(8 << 20))
    pieces = link._pieces

    def sending(path: Path, offset: int) -> Iterator[bytes]:
        for number, piece in enumerate(pieces(path, offset)):
            if number == 1:
                monkeypatch.setattr(site.transfer.limits, "is_expected", lambda: False)
                site.lane.uploads.end_run()
            if number == 2:  # the coordinator has got more, and answers
                wait_for(lambda: all(map(_has_answer, link._http_client._busy)), "an early answer")
            yield piece

    link._pieces = sending  # type: ignore[method-assign]
    with pytest.raises(UploadUnneeded):
        link.upload(weights.file_digest(source), source)
    assert link.bytes_up <= 3 << 20


@pytest.mark.usefixtures("_large")
def test_an_upload_whose_line_is_cut_again_and_again_arrives(
    site: Site, machine: Machine, tmp_path: Path
) -> None:
    source = tmp_path / "update"
    source.write_bytes(bytes(range(256)) * 8192)
    digest, size = weights.file_digest(source), source.stat().st_size
    with Proxy(int(site.address.rpartition(":")[2])) as proxy:
        proxy.fault = Fault(cut_after=400_000, bytes_per_s=4_000_000)
        link = elsewhere(site, machine, f"{HOST}:{proxy.port}")
        tries = 0
        while not site.lane.uploads.path(machine.peer, digest).exists():
            tries += 1
            with suppress(Unreachable):  # a whole connection may bring nothing on a busy machine
                link.upload(digest, source)
        assert site.lane.uploads.path(machine.peer, digest).read_bytes() == source.read_bytes()
        assert proxy.connections >= 6 > tries
        proxy.fault = Fault(cut_after=1000)  # less than the head of a request
        source.write_bytes(bytes(size))
        with pytest.raises(Unreachable):
            link.upload(weights.file_digest(source), source)
        link.close()


def test_a_wrong_beginning_on_the_other_side_is_sent_anew(
    site: Site, machine: Machine, link: CoordinatorClient, tmp_path: Path
) -> None:
    source = tmp_path / "update"
    source.write_bytes(b"right" * 1000)
    digest = weights.file_digest(source)
    (site.folder / "spool" / f"{machine.peer}-{digest}.part").write_bytes(b"wrong" * 100)
    link._last_upload = digest
    link.upload(digest, source)
    stored = site.folder / "spool" / f"{machine.peer}-{digest}.safetensors"
    assert stored.read_bytes() == source.read_bytes()


def test_credentials_hold_what_joining_gave(site: Site, machine: Machine) -> None:
    mine = site.credentials(machine)
    assert isinstance(mine, Credentials)
    assert mine.peer == identity.peer_id(identity.public_bytes(mine.sign_key))


def test_connections_are_kept_let_go_and_made_again(link: CoordinatorClient) -> None:
    link.open()
    link.heartbeat()
    [(kept, _)] = link._http_client._idle
    link.heartbeat()
    assert link._http_client._idle[0][0] is kept
    link.reconnect()
    assert kept.sock is None
    link.heartbeat()
    assert link.pull() is None


def test_a_connection_that_the_other_side_has_ended_is_not_used_again(
    site: Site, link: CoordinatorClient
) -> None:
    link.open()
    [(kept, _)] = link._http_client._idle
    kept.sock.shutdown(socket.SHUT_RDWR)
    link.heartbeat()
    assert link._http_client._idle[0][0] is not kept


def test_a_connection_that_was_idle_for_too_long_is_not_used_again(link: CoordinatorClient) -> None:
    link.open()
    [(kept, since)] = link._http_client._idle
    link._http_client._idle = [(kept, since - IDLE_CONNECTION_S)]
    link.heartbeat()
    assert link._http_client._idle[0][0] is not kept
    assert kept.sock is None


def test_a_disk_error_while_an_update_is_sent_is_not_taken_for_one_of_the_network(
    link: CoordinatorClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path, offset: int) -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.EIO, "the disk fails")

    source = tmp_path / "update"
    source.write_bytes(bytes(1000))
    monkeypatch.setattr(link, "_pieces", failing)
    with pytest.raises(OSError, match="the disk fails"):
        link.upload(weights.file_digest(source), source)


def answered(link: CoordinatorClient, question: Message) -> Message:
    return Message(RecordDict({"c": ConfigRecord({"a": 1})}), reply_to=question)


def asked(site: Site, link: CoordinatorClient, machine: Machine) -> Message:
    content = RecordDict({"config": ConfigRecord()})
    site.grid.push_messages([Message(content, site.nodes[machine.peer], "train")])
    question = link.pull()
    assert question is not None
    return question


def test_a_small_update_goes_with_the_answer(
    site: Site, machine: Machine, link: CoordinatorClient, tmp_path: Path
) -> None:
    source = tmp_path / "update"
    source.write_bytes(b"small")
    digest = weights.file_digest(source)
    link.open()
    question = asked(site, link, machine)
    link.upload_update(digest, source)
    assert not site.lane.uploads.path(machine.peer, digest).exists()
    link.push(answered(link, question))
    assert site.lane.uploads.path(machine.peer, digest).read_bytes() == b"small"
    assert link.bytes_up == 5


def test_a_large_update_goes_at_once(
    site: Site, machine: Machine, link: CoordinatorClient, tmp_path: Path
) -> None:
    source = tmp_path / "update"
    source.write_bytes(bytes(INLINE_MAX_BYTES + 1))
    digest = weights.file_digest(source)
    link.upload_update(digest, source)
    assert site.lane.uploads.path(machine.peer, digest).exists()


def test_a_small_update_that_is_refused_with_its_answer_is_refused_as_others_are(
    site: Site,
    machine: Machine,
    link: CoordinatorClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tmp_path / "update"
    source.write_bytes(b"small")
    link.open()
    question = asked(site, link, machine)
    monkeypatch.setattr(site.transfer.limits, "max_bytes", 3)
    link.upload_update(weights.file_digest(source), source)
    with pytest.raises(UploadRefused, match="it has 5 bytes, and this run takes at most 3"):
        link.push(answered(link, question))
    monkeypatch.setattr(site.transfer.limits, "max_bytes", 100)
    monkeypatch.setattr(site.transfer.limits, "version_bytes", 2**60)
    link.upload_update(weights.file_digest(source), source)
    with pytest.raises(CoordinatorDiskFull):
        link.push(answered(link, question))
    assert not site.lane.uploads.path(machine.peer, weights.file_digest(source)).exists()


@pytest.mark.parametrize("kind", ["answer", "equal records", "arrays", "error"])
def test_a_reply_is_packed_as_flower_packs_it(kind: str) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3
    asked = Message(RecordDict(), dst_node_id=7, message_type="train")
    content = {
        "answer": RecordDict({"c": ConfigRecord({"x": b"1", "n": 2}), "m": MetricRecord()}),
        "equal records": RecordDict({"a": ConfigRecord({"x": 1}), "b": ConfigRecord({"x": 1})}),
        "arrays": RecordDict({"w": ArrayRecord([np.ones(3), np.ones(3), np.zeros(2)])}),
        "error": None,
    }[kind]
    reply = Message(content or Error(2, "no"), reply_to=asked)
    packed = pack_message(reply)
    objects = inflatable_object.get_all_nested_objects(reply)
    assert packed.objects == {one: part.deflate() for one, part in objects.items()}
    tree = ObjectTree.FromString(packed.tree)
    assert tree == inflatable_object.get_object_tree(reply)
    assert reply.metadata.message_id == reply.object_id == tree.object_id
    again = pack_message(unpack_message(packed))
    assert (again.objects, again.tree) == (packed.objects, packed.tree)
