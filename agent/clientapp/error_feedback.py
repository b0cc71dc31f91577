"""What the trainer made, as the run's codec sends it; and what the codec leaves over, on disk.

A run's file of leftovers goes when another run has work for this agent: the coordinator works on
one after the other.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from agent.home.run_state import RunStateFolder
from protocols.codecs import registry
from protocols.codecs.registry import Codec, Encoded
from protocols.errors import BadWeights
from protocols.model.weights import Schema, check_schema
from protocols.model.weights_file import WeightsFile

log = logging.getLogger("commonweight.agent")


class ErrorFeedback:
    """The files of leftovers in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._files = RunStateFolder(folder, ".left")
        self.settle = self._files.commit

    def encode(self, codec: Codec, run: str, trained: Path, base: Path, out: Path) -> Encoded:
        """Write the update to `out`; its leftovers wait for `settle`.

        Raises BadWeights where the training went to NaN or infinity, OSError.
        """
        self._files.keep_only(run)
        kept = self._files.paths(run)
        with contextlib.ExitStack() as stack:
            old = stack.enter_context(WeightsFile(base))
            new = stack.enter_context(WeightsFile(trained))
            left = self._open(kept.file, old.schema)
            if left is not None:
                stack.enter_context(left)
            made = registry.encode(codec, new, old, left, out, kept.next)
        self._files.stage(run, made.digest)
        return made

    def _open(self, path: Path, schema: Schema) -> WeightsFile | None:
        """What was left over before, or None for nothing."""
        try:
            left = WeightsFile(path)
        except FileNotFoundError:
            return None
        except BadWeights as err:
            log.warning("dropped what earlier updates left over: %s", err.message)
            return None
        try:
            check_schema(left.schema, registry.residual_schema(schema))
        except BadWeights:
            left.close()
            log.warning("dropped what earlier updates left over: it is for another model")
            return None
        return left
