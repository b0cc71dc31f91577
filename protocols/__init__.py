"""Code that agent and coordinator share: messages, weights, codecs, keys. No sockets and no
PyTorch."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("commonweight")
except PackageNotFoundError:  # a source tree that was never installed
    VERSION = "0.0.0"

__all__ = ["VERSION"]
