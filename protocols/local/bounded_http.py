"""HTTP requests with httpx whose response has a bound: in bytes, in time, and without compression.

A server could otherwise fill the memory of this machine, for example with a small gzip body that
unpacks to gigabytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import httpx

from protocols.errors import Unreachable

#: A complete response must arrive within this time. Each step has the client's own timeout.
WITHIN_S = 60.0
_NOT_TRUSTED = "no more of it was read; is this the right coordinator, and of the same version?"


def request(
    http: httpx.Client,
    method: str,
    url: str,
    *,
    max_bytes: int,
    content: bytes = b"",
    headers: Mapping[str, str] = {},
    within_s: float = WITHIN_S,
) -> httpx.Response:
    """The response, with a body of at most `max_bytes` that arrives `within_s`.

    Raises Unreachable and httpx.HTTPError.
    """
    body, began = bytearray(), time.monotonic()
    sent = {**headers, "accept-encoding": "identity"}
    with http.stream(method, url, content=content, headers=sent) as answer:
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise Unreachable(f"{url} sends a compressed response", _NOT_TRUSTED)
        for piece in answer.iter_raw():
            body += piece
            if len(body) > max_bytes:
                raise Unreachable(
                    f"the response of {url} has more than {max_bytes:,} bytes", _NOT_TRUSTED
                )
            if time.monotonic() - began > within_s:  # a byte now and then
                raise httpx.ReadTimeout(f"the response takes longer than {within_s:.0f} s")
    date = {"date": answer.headers["date"]} if "date" in answer.headers else {}
    return httpx.Response(
        answer.status_code, headers=date, content=bytes(body), request=answer.request
    )
