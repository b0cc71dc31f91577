"""Texts for failed connections, without error numbers. Pure."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

#: By the class name of an error whose own message says no more.
_TEXTS = {
    "gaierror": "there is no machine of that name",
    "RemoteProtocolError": "the connection was closed in the middle of an answer",
    "ReadError": "the connection was closed",
    "WriteError": "the connection was closed",
}


def describe_error(err: BaseException) -> str:
    """Text for a failed connection, from the lowest cause of a library's error."""
    lowest_first = list(causes(err))[::-1]
    for cause in lowest_first:
        match cause:
            case ConnectionRefusedError():
                return "nothing listens on that port"
            case TimeoutError():
                return "no answer in time"
            case ConnectionError():
                return "the connection was closed"
            case ssl.SSLCertVerificationError():
                return _describe_certificate(cause)
    for cause in lowest_first:
        name = type(cause).__name__
        if name in _TEXTS:
            return _TEXTS[name]
        if name.endswith("Timeout"):
            return "no answer in time"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror[:1].lower() + cause.strerror[1:]
    return str(err) or type(err).__name__


def _describe_certificate(err: ssl.SSLCertVerificationError) -> str:
    """OpenSSL's codes 62 and 64: the certificate has other names than the one that we asked for."""
    if err.verify_code in (62, 64):
        name = err.verify_message.rpartition("not valid for ")[2].strip("'.")
        fix = f"on the coordinator: commonweight init --san {name}"
        return f"its certificate does not name {name} ({fix})"
    return f"its certificate is not valid: {err.verify_message}"


def causes(err: BaseException | None) -> Iterator[BaseException]:
    """The error and its chain of causes, the lowest last."""
    seen: set[int] = set()
    while err is not None and id(err) not in seen:
        seen.add(id(err))
        yield err
        err = err.__cause__ or err.__context__
