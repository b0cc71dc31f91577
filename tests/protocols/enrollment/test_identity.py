"""Keys, ids and certificates: what is checked, and what a wrong one is told."""

from __future__ import annotations

import datetime
import os
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from protocols.enrollment import certificates, identity
from protocols.enrollment.certificates import NodeCertificate
from protocols.errors import BadMessage, HomeError
from protocols.local.atomic_files import write_private


@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_is_four_groups_of_four(public: bytes) -> None:
    made = identity.peer_id(public)
    assert [len(group) for group in made.split("-")] == [4, 4, 4, 4]
    assert made == identity.peer_id(public)


def test_a_peer_id_stays_what_it_was() -> None:
    """Ledgers and enrollments of older versions name peers by it."""
    assert identity.peer_id(bytes(32)) == "MZUH-VLPY-MK6X-O3E6"


# --- TLS -------------------------------------------------------------------------------------


def shake_hands(folder: Path, server_ca: bytes, trusted_ca: bytes, name: str) -> None:
    """One TLS handshake on a socket pair, with the strictest flags there are. Raises SSLError."""
    client_context = ssl.create_default_context(cadata=trusted_ca.decode())
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(folder / "server.pem", folder / "server.key")
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server_context.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()  # the client's error is the one that is looked at

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        client_context.wrap_socket(ours, server_hostname=name).close()
    finally:
        ours.close()
        serving.join()


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, bytes]:
    ca_key, ca_pem = certificates.new_ca("here")
    key, pem = certificates.new_server_certificate(
        ca_key, ca_pem, ["localhost", "127.0.0.1", "::1"]
    )
    write_private(tmp_path / "server.key", identity.private_pem(key))
    (tmp_path / "server.pem").write_bytes(pem)
    return tmp_path, ca_pem


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
def test_the_chain_passes_strict_checks(chain: tuple[Path, bytes], name: str) -> None:
    folder, ca_pem = chain
    shake_hands(folder, ca_pem, ca_pem, name)


def test_another_name_or_another_ca_is_refused(chain: tuple[Path, bytes]) -> None:
    folder, ca_pem = chain
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(folder, ca_pem, ca_pem, "elsewhere")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(folder, ca_pem, certificates.new_ca("here")[1], "localhost")


def test_what_a_server_certificate_says(chain: tuple[Path, bytes]) -> None:
    folder, _ = chain
    pem = (folder / "server.pem").read_bytes()
    assert certificates.certificate_names(pem) == {"localhost", "127.0.0.1", "::1"}
    assert 364 < certificates.days_left(pem) <= 365
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=400)
    assert certificates.days_left(pem, later) < 0


def test_a_fingerprint_is_that_of_the_der_form() -> None:
    _, ca_pem = certificates.new_ca("x")
    der = x509.load_pem_x509_certificate(ca_pem).public_bytes(serialization.Encoding.DER)
    again = ssl.DER_cert_to_PEM_cert(der).encode()
    assert certificates.ca_fingerprint(again) == certificates.ca_fingerprint(ca_pem)
    for junk in (b"", b"hello", ca_pem[:100]):
        with pytest.raises(BadMessage):
            certificates.ca_fingerprint(junk)


# --- node certificates -----------------------------------------------------------------------


def a_certificate() -> NodeCertificate:
    return NodeCertificate(
        fleet="0" * 16,
        peer="P",
        name="box",
        sign_public=bytes(32),
        node_public=b"n",
        not_after=1.0,
    )


def test_a_node_certificate_is_read_and_a_strange_one_refused() -> None:
    ca_key, ca_pem = certificates.new_ca("x")
    issued = certificates.issue_certificate(ca_key, a_certificate())
    assert certificates.verify_certificate(ca_pem, issued) == a_certificate()
    other_key, other_pem = certificates.new_ca("x")
    for pem, data in (
        (other_pem, issued),
        (ca_pem, certificates.issue_certificate(other_key, a_certificate())),
        (ca_pem, b""),
        (ca_pem, issued[:64]),
        (ca_pem, issued + b" "),
    ):
        with pytest.raises(BadMessage, match="not signed"):
            certificates.verify_certificate(pem, data)


@given(st.data())
def test_every_flipped_bit_of_a_certificate_is_found(data: st.DataObject) -> None:
    ca_key, ca_pem = certificates.new_ca("x")
    issued = bytearray(certificates.issue_certificate(ca_key, a_certificate()))
    at = data.draw(st.integers(0, len(issued) * 8 - 1))
    issued[at // 8] ^= 1 << at % 8
    with pytest.raises(BadMessage):
        certificates.verify_certificate(ca_pem, bytes(issued))


def test_a_signature_over_something_else_is_no_certificate() -> None:
    ca_key, ca_pem = certificates.new_ca("x")
    for body in (b"[]", b'{"v":1}', b"\xff"):
        signed = ca_key.sign(b"commonweight node certificate 1\n" + body) + body
        with pytest.raises(BadMessage, match="not a valid node certificate"):
            certificates.verify_certificate(ca_pem, signed)


def public_pem(key: object) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    pem: bytes = key.public_key().public_bytes(serialization.Encoding.PEM, form)  # type: ignore[attr-defined]
    return pem


def test_only_a_p384_key_is_a_node_key() -> None:
    identity.check_node_public(identity.node_public_pem(identity.new_node_key()))
    for wrong in (
        public_pem(ec.generate_private_key(ec.SECP256R1())),
        public_pem(rsa.generate_private_key(65537, 2048)),
        public_pem(identity.new_signing_key()),
        b"",
        b"\x00" * 200,
        _UNKNOWN_CURVE,
    ):
        with pytest.raises(BadMessage):
            identity.check_node_public(wrong)


#: A well-formed key on a curve that nobody knows (object id 1.3.132.0.127).
_UNKNOWN_CURVE = (
    ssl.DER_cert_to_PEM_cert(
        bytes.fromhex("3021301006072a8648ce3d020106052b8104007f030d0004") + bytes(10)
    )
    .replace("CERTIFICATE", "PUBLIC KEY")
    .encode()
)


# --- key files -------------------------------------------------------------------------------


def test_key_files_are_private_and_come_back(tmp_path: Path) -> None:
    sign, node = identity.new_signing_key(), identity.new_node_key()
    write_private(tmp_path / "sign", identity.private_pem(sign))
    write_private(tmp_path / "node", identity.private_pem(node))
    read = identity.load_signing_key(tmp_path / "sign")
    assert identity.public_bytes(read) == identity.public_bytes(sign)
    assert identity.node_public_pem(
        identity.load_node_key(tmp_path / "node")
    ) == identity.node_public_pem(node)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["node", "sign"]
    if os.name == "posix":
        assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o600}


def test_a_wrong_key_file_is_a_fault_of_the_home(tmp_path: Path) -> None:
    write_private(tmp_path / "node", identity.private_pem(identity.new_node_key()))
    write_private(tmp_path / "sign", identity.private_pem(identity.new_signing_key()))
    (tmp_path / "junk").write_bytes(b"\x00 no key")
    (tmp_path / "locked").write_bytes(
        identity.new_signing_key().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    for name in ("node", "junk", "locked", "missing"):
        with pytest.raises(HomeError, match=name):
            identity.load_signing_key(tmp_path / name)
    for name in ("sign", "junk", "locked", "missing"):
        with pytest.raises(HomeError, match=name):
            identity.load_node_key(tmp_path / name)


def test_a_private_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"open to all")
    write_private(path, b"mine")
    assert path.read_bytes() == b"mine"
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600


def test_signatures() -> None:
    key = identity.new_signing_key()
    public, signature = identity.public_bytes(key), key.sign(b"message")
    assert identity.verify(public, signature, b"message")
    assert not identity.verify(public, signature, b"massage")
    assert not identity.verify(public, signature[:-1], b"message")
    assert not identity.verify(b"short", signature, b"message")
    assert not identity.verify(identity.public_bytes(identity.new_signing_key()), signature, b"")
