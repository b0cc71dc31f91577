"""Signed requests: how our own HTTP routes authenticate the sender. Pure.

TLS client certificates are no option, as the server library does not pass them to the app. So a
request carries the sender's id, the receiver's id, a time, a nonce and an Ed25519 signature over
receiver, method, path, body digest, time and nonce. A signature is valid once and for `WINDOW_S`:
the receiver remembers nonces that long. The receiver is a fleet, or the peer that is asked.

The older format 1 names no receiver, so any receiver of such a request can pass it on. A sender
uses it only for receivers that know no other, and it is refused from senders that use format 2.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from base64 import b64decode, b64encode
from binascii import Error as BadBase64
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from protocols.errors import BadMessage

WINDOW_S = 300.0
_BUCKET_S = 60.0
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()

SENDER = "x-cw-sender"
TIME = "x-cw-time"
NONCE = "x-cw-nonce"
BODY = "x-cw-body"
SIGNATURE = "x-cw-signature"
RECEIVER = "x-cw-receiver"
#: The newest format of signatures: 1 without a receiver, 2 with.
FORMAT = 2


class SignedRequest(NamedTuple):
    """The headers of a signed request. The caller must compare `body_sha256` with the body.

    `receiver` is empty in format 1.
    """

    sender: str
    at: float
    nonce: str
    body_sha256: str
    signature: bytes
    message: bytes
    receiver: str


def sign_headers(
    sender: str,
    sign: Callable[[bytes], bytes],
    method: str,
    path: str,
    body_sha256: str = EMPTY_SHA256,
    receiver: str = "",
) -> dict[str, str]:
    """The headers of a signed request. `path` includes the query string.

    `receiver`: the id of the fleet or of the peer; empty for one that knows only format 1.
    """
    at, nonce = repr(time.time()), secrets.token_hex(12)
    message = _message(receiver, method, path, body_sha256, at, nonce)
    named = {RECEIVER: receiver} if receiver else {}
    return named | {
        SENDER: sender,
        TIME: at,
        NONCE: nonce,
        BODY: body_sha256,
        SIGNATURE: b64encode(sign(message)).decode(),
    }


def parse(
    method: str, path: str, sent: Mapping[str, str], now: float, own: str = ""
) -> SignedRequest:
    """The headers, with receiver, time and format checked, but not the signature.

    `own`: the id of this receiver. Raises BadMessage.
    """
    try:
        sender, at, nonce = sent[SENDER], float(sent[TIME]), sent[NONCE]
        body, signature = sent[BODY], b64decode(sent[SIGNATURE], validate=True)
    except (KeyError, ValueError, BadBase64) as err:
        raise BadMessage("the request is not signed") from err
    if not abs(now - at) <= WINDOW_S:
        raise BadMessage(f"the sender's clock differs from ours by {now - at:+.0f} s")
    if len(nonce) != 24 or len(body) != 64 or len(signature) != 64:
        raise BadMessage("the request is not signed")
    if b64encode(signature).decode() != sent[SIGNATURE]:  # spare bits of the last character
        raise BadMessage("the signature is not in canonical base64")
    receiver = sent.get(RECEIVER, "")
    if receiver not in ("", own):
        raise BadMessage("the request is for another fleet or peer")
    message = _message(receiver, method, path, body, sent[TIME], nonce)
    return SignedRequest(sender, at, nonce, body, signature, message, receiver)


def _message(receiver: str, method: str, path: str, body_sha256: str, at: str, nonce: str) -> bytes:
    head = ("commonweight request 2", receiver) if receiver else ("commonweight request 1",)
    return "\n".join((*head, method, path, body_sha256, at, nonce)).encode()


class NonceCache:
    """Remembers nonces while their signatures are valid, at most `limit` of each sender.

    The limit is per sender, so that one sender cannot lock out others.
    """

    def __init__(self, limit: int = 200_000) -> None:
        #: By sender: hashes of nonces in order of arrival, with the time of the last of each set.
        self._seen: dict[str, deque[tuple[float, set[int]]]] = {}
        self._limit = limit

    def use(self, sender: str, nonce: str, now: float) -> bool:
        """True the first time; False for a replay, or if the sender is at its limit."""
        sets = self._seen.setdefault(sender, deque())
        # A signature may be dated one window ahead, so it is valid for up to two after arrival.
        while sets and now - sets[0][0] > 2 * WINDOW_S:
            sets.popleft()
        key = hash(nonce)
        if any(key in seen for _, seen in sets) or sum(len(s) for _, s in sets) >= self._limit:
            return False
        if not sets or now // _BUCKET_S != sets[-1][0] // _BUCKET_S:
            sets.append((now, set()))
        seen = sets[-1][1]
        seen.add(key)
        sets[-1] = (now, seen)
        return True
