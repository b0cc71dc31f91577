"""Why nobody could be reached, in words for a person: never a number of an error. Pure."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

#: By the names of libraries' errors, which say no more.
_NAMES = {
    "gaierror": "no machine of that name is known",
    "RemoteProtocolError": "it broke off in the middle of an answer",
    "ReadError": "it broke off",
    "WriteError": "it broke off",
}


def describe_error(err: BaseException) -> str:
    """Words for a failed connection, from the error below a library's own."""
    causes = list(_causes(err))
    for cause in reversed(causes):
        match cause:
            case ConnectionRefusedError():
                return "nobody listens there"
            case TimeoutError():
                return "no answer in time"
            case ConnectionError():
                return "it broke off"
            case ssl.SSLCertVerificationError():
                return f"its certificate is not good: {cause.verify_message}"
    for cause in reversed(causes):
        name = type(cause).__name__
        if name in _NAMES:
            return _NAMES[name]
        if name.endswith("Timeout"):
            return "no answer in time"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror[:1].lower() + cause.strerror[1:]
    return str(err) or type(err).__name__


def _causes(err: BaseException | None) -> Iterator[BaseException]:
    """The error and what lies below it, the lowest last."""
    seen: set[int] = set()
    while err is not None and id(err) not in seen:
        seen.add(id(err))
        yield err
        err = err.__cause__ or err.__context__
