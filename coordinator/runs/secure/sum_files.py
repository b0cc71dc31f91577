"""The open cohort: its state in memory, and the files that are durable before their events."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping

import msgspec

from coordinator.runs.state import COHORT, CohortState
from coordinator.storage.spool import Spool
from protocols.local.failpoints import failpoint
from protocols.privacy.secagg import aggregator as secagg
from protocols.privacy.secagg.aggregator import Aggregator
from protocols.privacy.secagg.messages import ShareAnswer, ShareRequest, decode_request

_SHARES = msgspec.msgpack.Decoder(dict[str, ShareAnswer])


class SumFiles:
    """The files of a cohort in the spool, and what follows from them."""

    def __init__(self, uploads: Spool) -> None:
        self._uploads = uploads
        self._aggregator: Aggregator | None = None
        #: The digest of the request that the aggregator was made from.
        self._request = ""

    def open(self, cohort: CohortState) -> Aggregator:
        """The state of the open cohort: from memory, or from the files. Raises OSError."""
        if self._aggregator is None or self._request != cohort.request:
            request = decode_request("share", self._uploads.read(COHORT, cohort.request))
            assert isinstance(request, ShareRequest)
            self._aggregator = Aggregator(secagg.CohortFixed(request=request))
            self._request = cohort.request
        state = self._aggregator
        if cohort.sharers and not state.sharers:
            if not state.shares:
                shares = _SHARES.decode(self._uploads.read(COHORT, cohort.shares))
                for peer, answer in shares.items():
                    state.take(peer, answer)
            state.apply(secagg.SharersFixed(sharers=cohort.sharers))
        state.uploads |= cohort.masked
        if cohort.survivors and not state.survivors:
            state.apply(secagg.SurvivorsFixed(survivors=cohort.survivors))
        return state

    async def write(self, name: str, data: bytes) -> str:
        """Store a file durably; its digest. `name`: of the failpoints around it."""
        digest = hashlib.sha256(data).hexdigest()
        failpoint("secure.writing", name)
        await asyncio.to_thread(self._uploads.write, COHORT, digest, data)
        failpoint("secure.written", name)
        return digest


def step_of(cohort: CohortState, state: Aggregator) -> tuple[tuple[str, ...], Mapping[str, object]]:
    """The peers that are asked in this step, and the answers of those that have answered."""
    if not cohort.sharers:
        return cohort.peers, state.shares
    if not cohort.survivors:
        return cohort.sharers, state.uploads
    return cohort.survivors, state.told
