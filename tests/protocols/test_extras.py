"""Errors for packages that are not installed."""

from __future__ import annotations

from importlib import import_module

import pytest

from protocols.errors import MissingPackage
from protocols.extras import needs_extra


def test_a_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(MissingPackage) as caught, needs_extra("lora", "the task lora"):
        import_module("no_such_package")
    assert caught.value.message.startswith("the task lora needs no_such_package, ")
    assert caught.value.hint == "pip install 'commonweight[lora]'"
    with pytest.raises(MissingPackage) as caught, needs_extra("x", "y", "z"):
        import_module("no_such_package")
    assert caught.value.hint == "pip install 'commonweight[x]', or z"
