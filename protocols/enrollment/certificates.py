"""X.509 certificates of the coordinator's CA and of TLS, and the certificates of nodes. Pure.

The CA (Ed25519) signs the coordinator's TLS certificate and the node certificates. If its key is
kept offline, an issuer signs in its place: an intermediate certificate of the CA, which travels
with what it signs.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import ssl
from collections.abc import Iterable
from functools import partial
from typing import Annotated

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocols.enrollment.identity import (
    NodeKey,
    SigningKey,
    new_signing_key,
    public_pem,
    verify,
)
from protocols.errors import BadMessage
from protocols.messages.envelope import Count, Id, Name, PublicKey
from protocols.messages.signing import SignedJson

CA_DAYS = 3650
CERTIFICATE_DAYS = 365


def new_ca(fleet_name: str, *, with_issuers: bool = False) -> tuple[SigningKey, bytes]:
    """A CA key and its self-signed certificate (PEM). `with_issuers`: it may have issuers."""
    key = new_signing_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"commonweight {fleet_name}")])
    certificate = _ca_builder(subject, subject, key, path_length=1 if with_issuers else 0).sign(
        key, None
    )
    return key, certificate.public_bytes(serialization.Encoding.PEM)


def new_issuer(ca_key: SigningKey, ca_pem: bytes) -> tuple[SigningKey, bytes]:
    """The key and the certificate (PEM) of an issuer, which signs in place of the CA."""
    key, ca = new_signing_key(), load_ca(ca_pem)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "commonweight issuer")])
    certificate = (
        _ca_builder(subject, ca.subject, key, path_length=0)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, None)
    )
    return key, certificate.public_bytes(serialization.Encoding.PEM)


def signer_public(ca_pem: bytes, issuer: bytes) -> bytes:
    """The Ed25519 key of the CA, or of its issuer if `issuer` (PEM) is not empty.

    Raises BadMessage unless the CA made this issuer, and it is valid now.
    """
    if not issuer:
        return ca_public(ca_pem)
    certificate, ca = load_ca(issuer), load_ca(ca_pem)
    try:
        certificate.verify_directly_issued_by(ca)
        limits = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as err:
        raise BadMessage("the issuer is not certified by this fleet's CA") from err
    if not limits.ca or not usage.key_cert_sign:
        raise BadMessage("the issuer's certificate is not one for issuers")
    now = datetime.datetime.now(datetime.UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise BadMessage("the issuer's certificate has expired, or a clock is wrong")
    return ca_public(issuer)


def issued_at(issuer: bytes) -> float:
    """When an issuer's certificate begins (Unix s); 0 for the CA itself. Raises BadMessage."""
    return load_ca(issuer).not_valid_before_utc.timestamp() if issuer else 0.0


def new_server_certificate(
    ca_key: SigningKey, ca_pem: bytes, names: Iterable[str]
) -> tuple[NodeKey, bytes]:
    """A TLS key (P-256) and certificate for these DNS names and addresses, signed by the CA.

    `ca_key` and `ca_pem` may be those of an issuer.
    """
    ca = load_ca(ca_pem)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "commonweight coordinator")])
    certificate = (
        _builder(subject, ca.subject, CERTIFICATE_DAYS)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
        )
        # Python 3.13 checks certificates strictly (RFC 5280) and refuses one without this.
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, None)
    )
    return key, certificate.public_bytes(serialization.Encoding.PEM)


def new_node_tls(key: NodeKey, peer: str) -> bytes:
    """A self-signed TLS certificate (PEM) over a node key, for serving other peers.

    Clients do not trust its name: they compare its key (`certificate_matches_key`).
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"commonweight peer {peer}")])
    certificate = (
        _builder(subject, subject, CERTIFICATE_DAYS)
        .public_key(key.public_key())
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def pinned_context() -> ssl.SSLContext:
    """For connections to a server that a known key authenticates, not a CA.

    It verifies nothing: call `certificate_matches_key` after the handshake, before a request.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def certificate_matches_key(certificate_der: bytes, node_public_pem: bytes) -> bool:
    """True if a TLS certificate (DER) is for this node key."""
    try:
        key = x509.load_der_x509_certificate(certificate_der).public_key()
    except (ValueError, UnsupportedAlgorithm):
        return False
    return isinstance(key, ec.EllipticCurvePublicKey) and public_pem(key) == node_public_pem


def certificate_names(pem: bytes) -> set[str]:
    """The DNS names and addresses in a TLS certificate."""
    certificate = x509.load_pem_x509_certificate(pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names}


def is_issued_by(pem: bytes, ca_pem: bytes) -> bool:
    """True if this CA or issuer (PEM) signed the first certificate in `pem`. Raises ValueError."""
    try:
        x509.load_pem_x509_certificate(pem).verify_directly_issued_by(load_ca(ca_pem))
    except (BadMessage, TypeError, InvalidSignature):
        return False
    return True


def days_left(pem: bytes, now: datetime.datetime | None = None) -> float:
    """Days until the certificate expires; negative if it has."""
    now = now or datetime.datetime.now(datetime.UTC)
    return (x509.load_pem_x509_certificate(pem).not_valid_after_utc - now).total_seconds() / 86400


def load_ca(pem: bytes) -> x509.Certificate:
    """The CA certificate, if `pem` is exactly one in canonical form. Raises BadMessage.

    TLS trusts every certificate in a PEM text, so a second one would be a second CA.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        is_ed25519 = isinstance(certificate.public_key(), ed25519.Ed25519PublicKey)
    except (ValueError, UnsupportedAlgorithm) as err:
        raise BadMessage("not a PEM certificate") from err
    if certificate.public_bytes(serialization.Encoding.PEM) != pem:
        raise BadMessage("not exactly one certificate in canonical PEM form")
    if not is_ed25519:
        raise BadMessage("the CA's key is not an Ed25519 key")
    return certificate


def ca_public(pem: bytes) -> bytes:
    """The CA's Ed25519 key (raw, 32 bytes). Raises BadMessage."""
    key = load_ca(pem).public_key()
    assert isinstance(key, ed25519.Ed25519PublicKey)
    return key.public_bytes_raw()


def ca_fingerprint(pem: bytes) -> bytes:
    """SHA-256 of the CA certificate in DER form, as in a ticket. Raises BadMessage."""
    return load_ca(pem).fingerprint(hashes.SHA256())


def fleet_id(ca_pem: bytes) -> str:
    """The fleet's id: the first 16 hexadecimal digits of its CA's SHA-256. Raises BadMessage."""
    return ca_fingerprint(ca_pem).hex()[:16]


def _builder(subject: x509.Name, issuer: x509.Name, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # for machines with a slow clock
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _ca_builder(
    subject: x509.Name, issuer: x509.Name, key: SigningKey, path_length: int
) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        _builder(subject, issuer, CA_DAYS)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


# --- node certificates ---------------------------------------------------------------------


class NodeCertificate(msgspec.Struct, frozen=True, kw_only=True):
    """A peer's two public keys, certified by the CA until `not_after` (Unix s).

    `issuer`: the certificate (PEM) of the issuer that signed it, or empty for the CA.
    """

    v: Count = 1
    fleet: Id
    peer: Id
    name: Name
    sign_public: PublicKey
    node_public: Annotated[bytes, msgspec.Meta(max_length=1024)]
    not_after: float
    issuer: Annotated[bytes, msgspec.Meta(max_length=2048)] = b""


_SIGNED_CERTIFICATE = SignedJson(
    NodeCertificate, "node certificate", "node certificate", "this fleet's CA"
)


def issue_certificate(ca_key: SigningKey, certificate: NodeCertificate) -> bytes:
    """The signed certificate: 64 bytes of signature, then JSON."""
    return _SIGNED_CERTIFICATE.pack(certificate, ca_key.sign)


def verify_certificate(ca_pem: bytes, data: bytes) -> NodeCertificate:
    """The certificate in `data`, if the CA signed it. Raises BadMessage."""
    issuer = b""
    with contextlib.suppress(BadMessage):  # `unpack` reports why it is not valid
        issuer = _SIGNED_CERTIFICATE.decode(data[64:]).issuer
    return _SIGNED_CERTIFICATE.unpack(data, partial(verify, signer_public(ca_pem, issuer)))
