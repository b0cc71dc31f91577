"""The HTTP client of joining: find the coordinator of a ticket, then send the join request.

It also fetches the transitions of a CA, which prove themselves.

Nothing is sent before the server's CA has the hash in the ticket.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import httpx
import msgspec

from protocols import VERSION
from protocols.enrollment import certificates, signed_requests, tickets
from protocols.enrollment.ca_chain import ChainResponse
from protocols.enrollment.joining import (
    CA_CHAIN_PATH,
    CA_PATH,
    ENROLLMENT_STATUS_PATH,
    EnrollmentStatus,
)
from protocols.enrollment.tickets import Ticket
from protocols.errors import BadMessage, Refused, Unreachable
from protocols.local import bounded_http
from protocols.messages.envelope import Sign, strip_controls
from protocols.network.error_text import causes, describe_error

T = TypeVar("T")

_TIMEOUT_S = 10.0
#: Codes of OpenSSL for a certificate that is not valid yet or expired, or has another name.
_RIGHT_CA = frozenset({9, 10, 62, 64})
_MAX_CA_BYTES = 64 * 1024
#: Of the answer to a request to join: certificates, keys and the address of the broker.
_MAX_ANSWER_BYTES = 256 * 1024


def find_coordinator(ticket: Ticket) -> tuple[str, bytes]:
    """The first address whose CA certificate matches the ticket, and that certificate (PEM).

    Raises Refused if other servers answer, and Unreachable if none does.
    """
    failed: list[str] = []
    strangers: list[str] = []
    # TLS is not verified here on purpose: this request only fetches the CA to compare its hash.
    with httpx.Client(verify=False, timeout=_TIMEOUT_S) as http:
        for address in ticket.addresses:
            try:
                ca_pem = _fetch_ca(http, address)
            except (httpx.HTTPError, httpx.InvalidURL) as err:
                failed.append(f"{address} ({err or type(err).__name__})")
                continue
            except Unreachable:  # far more than a certificate
                strangers.append(address)
                continue
            with contextlib.suppress(BadMessage):  # not a certificate
                if tickets.matches_ca(ticket, certificates.ca_fingerprint(ca_pem)):
                    return address, ca_pem
            strangers.append(address)  # also one that adds a certificate of its own to the right CA
    if strangers:
        raise Refused(
            f"{', '.join(strangers)} is not the coordinator that made this ticket",
            "another server answers there, or the fleet has a new CA since the ticket was made; "
            "nothing was sent. Ask for a new ticket",
        )
    raise Unreachable(
        f"no coordinator answers: {'; '.join(failed)}",
        "is it up (commonweight up), and can this machine reach it?",
    )


def _fetch_ca(http: httpx.Client, address: str) -> bytes:
    """The CA certificate of a server. Raises Unreachable, httpx.HTTPError."""
    url = f"https://{address}{CA_PATH}"
    answer = bounded_http.request(http, "GET", url, max_bytes=_MAX_CA_BYTES, within_s=_TIMEOUT_S)
    return answer.raise_for_status().content


def is_other_ca(err: BaseException) -> bool:
    """True if a connection failed because the server's certificate is not of the trusted CA."""
    return any(
        isinstance(cause, ssl.SSLCertVerificationError) and cause.verify_code not in _RIGHT_CA
        for cause in causes(err)
    )


def fetch_chain(address: str) -> ChainResponse:
    """The transitions of the CA that a server shows; none if it does not answer with any.

    TLS is not verified: each transition has the signature of the CA before it.
    """
    url, limit = f"https://{address}{CA_CHAIN_PATH}", _MAX_ANSWER_BYTES
    try:
        with httpx.Client(verify=False, timeout=_TIMEOUT_S) as http:
            answer = bounded_http.request(http, "GET", url, max_bytes=limit, within_s=_TIMEOUT_S)
        return msgspec.json.decode(answer.raise_for_status().content, type=ChainResponse)
    except (httpx.HTTPError, httpx.InvalidURL, Unreachable, msgspec.DecodeError, ValueError):
        return ChainResponse()


def find_new_ca(addresses: Iterable[str], known: T, follow: Callable[[ChainResponse], T]) -> T:
    """What follows from the first transitions at these addresses that lead to a newer CA; `known`
    if there are none.

    `follow(told)`: `known`, or with a newer CA; BadMessage for transitions of another fleet. Raises
    Refused if there are only those: another server may have taken over one of the addresses.
    """
    refused: Refused | None = None
    for address in addresses:
        if (told := fetch_chain(address)) == ChainResponse():
            continue  # no answer
        try:
            if (found := follow(told)) != known:
                return found
        except BadMessage as err:  # another address may be right
            refused = refused or Refused(
                f"the server at {address} has another CA than this fleet: {err.message}",
                "nothing was sent. Ask the operator who answers at this address",
            )
    if refused is not None:
        raise refused
    return known


def post_join(address: str, ca_pem: bytes, path: str, request: msgspec.Struct, kind: type[T]) -> T:
    """Send a join request over verified TLS; return the answer. Raises Unreachable, Refused."""
    body = msgspec.json.encode(request)
    try:
        answer = _send(address, ca_pem, "POST", path, content=body)
        if answer.is_success:
            return msgspec.json.decode(answer.content, type=kind)
        error = msgspec.json.decode(answer.content, type=dict[str, str])
        kind_of_error = Unreachable if answer.status_code == 503 else Refused
        raise kind_of_error(error["message"], error.get("hint", ""))
    except httpx.HTTPError as err:
        raise Unreachable(f"{address}: {describe_error(err)}", "try again") from err
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError) as err:
        raise Refused(
            f"the coordinator's answer ({answer.status_code}) cannot be decoded: {err}",
            "does the coordinator run another version? Else ask for a new ticket",
        ) from err


def _send(
    address: str,
    ca_pem: bytes,
    method: str,
    path: str,
    *,
    content: bytes = b"",
    headers: Mapping[str, str] = {},
) -> httpx.Response:
    """Send a request over TLS that trusts this CA alone, and read a bounded answer."""
    context = ssl.create_default_context(cadata=ca_pem.decode())
    with httpx.Client(verify=context, timeout=_TIMEOUT_S) as http:
        return bounded_http.request(
            http,
            method,
            f"https://{address}{path}",
            max_bytes=_MAX_ANSWER_BYTES,
            content=content,
            headers=headers,
            within_s=_TIMEOUT_S,
        )


def old_coordinator(address: str, ca_pem: bytes, sender: str, sign: Sign, hint: str) -> Refused:
    """The error for a coordinator that sent no fleet card. It names the coordinator's version.

    `sender` has just joined.
    """
    version = _ask_version(address, ca_pem, sender, sign) or "an older version"
    return Refused(
        f"the coordinator runs commonweight {version}, which does not sign its key and broker with "
        f"the fleet's CA; commonweight {VERSION} joins only with this signature",
        hint,
    )


def _ask_version(address: str, ca_pem: bytes, peer: str, sign: Sign) -> str:
    """The coordinator's version, asked as an enrolled peer; empty if it does not say."""
    headers = signed_requests.sign_headers(peer, sign, "GET", ENROLLMENT_STATUS_PATH)
    try:
        answer = _send(address, ca_pem, "GET", ENROLLMENT_STATUS_PATH, headers=headers)
        status = msgspec.json.decode(answer.raise_for_status().content, type=EnrollmentStatus)
    except (Unreachable, httpx.HTTPError, msgspec.DecodeError, UnicodeDecodeError):
        return ""
    return strip_controls(status.version)[:64]
