"""HTTP requests with httpx whose response has a bound: in bytes, in time, and without compression.

A server could otherwise fill the memory of this machine, for example with a small gzip body that
unpacks to gigabytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import httpx

from protocols.errors import Unreachable
from protocols.local import disk_space

#: A complete response must arrive within this time. Each step has the client's own timeout.
WITHIN_S = 60.0
#: A file that arrives more slowly than this is given up.
MIN_BYTES_PER_S = 50_000
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
    into: Path | None = None,
) -> httpx.Response:
    """The response, with a body of at most `max_bytes` that arrives `within_s`.

    With `into`, the body of a success is written to this file instead, as far as the disk has room
    for it. Raises Unreachable, httpx.HTTPError, and with `into` DiskFull, Refused and OSError.
    """
    body, began = bytearray(), time.monotonic()
    sent = {**headers, "accept-encoding": "identity"}
    with http.stream(method, url, content=content, headers=sent) as answer:
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise Unreachable(f"{url} sends a compressed response", _NOT_TRUSTED)
        if into is not None and answer.is_success:
            _save(answer, url, into)
        else:
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


def _save(answer: httpx.Response, url: str, path: Path) -> None:
    """Write the body to a file. httpx reads no more than the length that was announced."""
    announced = answer.headers.get("content-length", "")
    if not (announced.isascii() and announced.isdigit() and len(announced) < 16):
        raise Unreachable(f"{url} does not say how long its response is", _NOT_TRUSTED)
    disk_space.check_room(path.parent, int(announced))
    until = time.monotonic() + WITHIN_S + int(announced) / MIN_BYTES_PER_S
    with path.open("wb") as file:
        for piece in answer.iter_raw():
            file.write(piece)
            if time.monotonic() > until:
                raise httpx.ReadTimeout(f"less than {MIN_BYTES_PER_S:,} bytes a second arrive")
