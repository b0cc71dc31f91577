"""What the trainer made, as the run's codec sends it; and what the codec leaves over, on disk.

One file of leftovers a run. The next one waits under the update's digest until the answer that
names that update is safe: so a crash leaves the old leftovers with no update or the new with it,
and nothing is sent twice or lost. A run's file goes when another run has work for this agent: the
coordinator works on one after the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from pathlib import Path

from protocols import codecs
from protocols.codecs import Codec, Encoded
from protocols.errors import BadWeights
from protocols.stored import Stored
from protocols.weights import Schema, check_schema, sync_folder

log = logging.getLogger("commonweight.agent")

#: Leftovers that nobody has asked for so long are of a run that is over.
KEPT_S = 30 * 86400.0


class Leftovers:
    """The files of leftovers in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in folder.iterdir():
            if time.time() - path.stat().st_mtime > KEPT_S:
                path.unlink()

    def encode(self, codec: Codec, run: str, trained: Path, base: Path, out: Path) -> Encoded:
        """Write the update to `out`; its leftovers wait for `settle`.

        Raises BadWeights where the training went to NaN or infinity, OSError.
        """
        kept = self._of(run)
        for other in self._folder.iterdir():
            if other != kept:
                other.unlink()
        with contextlib.ExitStack() as stack:
            old = stack.enter_context(Stored(base))
            new = stack.enter_context(Stored(trained))
            left = self._open(kept, old.schema)
            if left is not None:
                stack.enter_context(left)
            waiting = kept.with_suffix(".new")
            made = codecs.encode(codec, new, old, left, out, waiting)
        waiting.replace(kept.with_suffix(f".{made.digest}"))
        sync_folder(self._folder)
        return made

    def settle(self, digest: str) -> None:
        """The update with this digest (empty: none) is the one that is sent; any other is not."""
        settled = False
        for path in self._folder.iterdir():
            if path.suffix == ".left":
                continue
            settled = True
            if path.suffix == f".{digest}":
                path.replace(path.with_suffix(".left"))
            else:
                path.unlink()
        if settled:
            sync_folder(self._folder)

    def _of(self, run: str) -> Path:
        """A run's file. Its id is text that came from afar: no part of a path."""
        return self._folder / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}.left"

    def _open(self, path: Path, schema: Schema) -> Stored | None:
        """What was left over before, or None for nothing."""
        try:
            left = Stored(path)
        except FileNotFoundError:
            return None
        except BadWeights as err:
            log.warning("dropped what earlier updates left over: %s", err.message)
            return None
        try:
            check_schema(left.schema, codecs.leftover_schema(schema))
        except BadWeights:
            left.close()
            log.warning("dropped what earlier updates left over: it is for another model")
            return None
        return left
