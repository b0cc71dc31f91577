"""The model of the active run: its schema and size, and the patch to its newest version."""

from __future__ import annotations

from coordinator.transport.weights import WeightTransfer
from protocols.codecs import registry
from protocols.codecs.registry import Codec
from protocols.model.weights import Schema
from protocols.model.weights_file import WeightsFile
from protocols.privacy.secagg import masked_file

#: Space for headers and codecs, in addition to the model's size.
_SLACK_BYTES = 1024 * 1024
#: The size of first weights is not known beforehand.
_MAX_FIRST_WEIGHTS_BYTES = 8 * 1024**3


class RunModel:
    """Empty until the run has a first version. Sets the size limits of uploads.

    `ring_bits`: of a secure run, whose uploads are masked; else 0.
    """

    def __init__(self, transfer: WeightTransfer, codec: Codec, ring_bits: int = 0) -> None:
        self.schema: Schema = {}
        self.nbytes = 0
        self.codec, self._ring_bits = codec, ring_bits
        self._transfer = transfer
        #: The version with a patch, its parent, and the patch's bytes. Empty after a restart.
        self._patch = ("", "", 0)

    def set_version(self, digest: str) -> None:
        """Take schema and size from a version."""
        with WeightsFile(self._transfer.store.version_path(digest)) as model:
            self.schema, self.nbytes = model.schema, model.nbytes
        self._transfer.limits.version_bytes = self.nbytes
        if self.codec.name == registry.SUMS or self.codec.rank:
            most = registry.max_bytes(self.codec, self.schema, self.nbytes)
        elif self._ring_bits:
            most = sum(masked_file.layout(self.schema)) * self._ring_bits // 8
        else:
            most = min(registry.max_bytes(self.codec, self.schema, self.nbytes), self.nbytes)
        self._transfer.limits.max_bytes = most + _SLACK_BYTES

    def expect_first_weights(self) -> None:
        """Allow uploads of first weights, whose size is not known."""
        self._transfer.limits.max_bytes = _MAX_FIRST_WEIGHTS_BYTES
        self._transfer.limits.version_bytes = 0

    def make_patch(self, parent: str, digest: str) -> None:
        """Make the patch to a new version, if it is small."""
        self._patch = (digest, parent, self._transfer.store.make_patch(parent, digest))

    def patch_to(self, digest: str) -> tuple[str, int]:
        """The parent that a version's patch applies to, and the patch's bytes; or ("", 0)."""
        patched, parent, nbytes = self._patch
        return (parent, nbytes) if patched == digest else ("", 0)
