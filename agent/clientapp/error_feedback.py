"""Encodes updates with the run's codec and keeps its error feedback on disk.

The file of a run is deleted when another run has work for this agent: the coordinator works on one
run at a time.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from agent.home.run_state import RunStateFolder
from protocols.codecs import registry
from protocols.codecs.registry import Codec, Encoded
from protocols.errors import BadWeights
from protocols.model.fragments import Fragment
from protocols.model.weights import Schema, check_schema
from protocols.model.weights_file import WeightsFile

log = logging.getLogger("commonweight.agent")


class ErrorFeedback:
    """The files of error feedback in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._files = RunStateFolder(folder, ".left")
        self.commit = self._files.commit

    @property
    def is_empty(self) -> bool:
        """True without error feedback."""
        return self._files.is_empty

    def encode(
        self,
        codec: Codec,
        run: str,
        trained: Path,
        base: Path,
        out: Path,
        fragment: Fragment = Fragment(),
    ) -> Encoded:
        """Writes the update to `out`. `commit` makes the new error feedback permanent.

        Each fragment has its own. Raises BadWeights for NaN or infinity, OSError.
        """
        names = [fragment._replace(number=n).slot(run) for n in range(fragment.total)]
        self._files.keep_only(*names)
        paths = self._files.paths(names[fragment.number])
        with WeightsFile(base) as version, WeightsFile(trained) as model:
            old, new = fragment.of(version), fragment.of(model)
            residual = self._open(paths.file, old.schema)
            with residual or contextlib.nullcontext():
                encoded = registry.encode(codec, new, old, residual, out, paths.next)
        self._files.stage(names[fragment.number], encoded.digest)
        return encoded

    def _open(self, path: Path, schema: Schema) -> WeightsFile | None:
        """Returns the error feedback of earlier updates, or None."""
        residual = None
        try:
            residual = WeightsFile(path)
            check_schema(residual.schema, registry.residual_schema(schema))
        except FileNotFoundError:
            return None
        except BadWeights as err:  # a damaged file, or one for another model
            log.warning("dropped the error feedback of earlier updates: %s", err.message)
            if residual is not None:
                residual.close()
            return None
        return residual
