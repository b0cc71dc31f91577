"""Prepares a process for apps that load data sets in the sandbox."""

from __future__ import annotations

import os
from typing import Any


def prepare() -> None:
    """Let Hugging Face's libraries use their caches alone, and do without `chmod`.

    The sandbox has no network, and refuses `chmod`, as Landlock does not limit it. `datasets` sets
    the modes of files in its cache, which the umask does as well.
    """
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.chmod = _unless_refused(os.chmod)


def _unless_refused(chmod: Any) -> Any:
    def chmod_or_not(*given: Any, **named: Any) -> None:
        try:
            chmod(*given, **named)
        except PermissionError:
            pass

    return chmod_or_not
