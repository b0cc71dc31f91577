"""What both sides agree on: names, messages, weights, keys. Pure: no sockets, no engine."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("commonweight")
except PackageNotFoundError:  # a source tree that was never installed
    VERSION = "0.0.0"

__all__ = ["VERSION"]
