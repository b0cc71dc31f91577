"""Answers the steps of secure sums, each after its state is on disk."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from agent.home.secure_store import TurnKey, TurnStore
from protocols.errors import SecureRefused
from protocols.privacy.secagg import peer
from protocols.privacy.secagg.cohort import Pins
from protocols.privacy.secagg.messages import (
    AgreeAnswer,
    AgreeRequest,
    MaskAnswer,
    MaskRequest,
    ReadyAnswer,
    ReadyRequest,
    ShareAnswer,
    ShareRequest,
    TailNames,
    UnmaskAnswer,
    UnmaskRequest,
)
from protocols.privacy.secagg.turn import Masking, Me, Turn
from protocols.privacy.shared_noise import SharedNoise

#: Writes the masked update to a file; returns its digest and its size in bytes.
Write = Callable[[Masking], tuple[str, int]]


class SecureTurns:
    """This agent in secure sums. `pins` returns the owner's rule as it is now.

    Every method raises SecureRefused, BadMessage, HomeError and DiskFull. After DiskFull the same
    request can be answered again.
    """

    def __init__(
        self,
        me: Me,
        store: TurnStore,
        pins: Callable[[], Pins],
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._me, self._store, self._pins, self._random_bytes = me, store, pins, random_bytes

    def ready(
        self,
        request: ReadyRequest,
        examples: int,
        names: TailNames,
        noise: SharedNoise | None = None,
    ) -> ReadyAnswer:
        """The card of this turn: the same one, if it was asked for before.

        `noise`: what the update has of the noise that peers share.
        """
        if (made := self.card(request)) is not None:
            return made
        state = peer.make_card(self._me, request, examples, self._random_bytes(32), names, noise)
        self._store.begin(state)
        return ReadyAnswer(card=state.card, names=state.names)

    def card(self, request: ReadyRequest) -> ReadyAnswer | None:
        """The card of this turn, if it was made. Raises SecureRefused if the turn is over."""
        key = TurnKey(request.run, request.round, request.turn, request.kind)
        if (state := self._store.get(key)) is None:
            return None
        if state.ready != request:
            raise SecureRefused("card", "the card of this turn is for other work")
        return ReadyAnswer(card=state.card, names=state.names)

    def newest(self, run: str) -> Turn | None:
        """The newest turn of this run, unless it is over."""
        return self._store.newest(run)

    def end_others(self, run: str = "") -> None:
        """Delete the secrets of all other runs; of all runs without a name."""
        self._store.end_others(run)

    def share(self, key: TurnKey, request: ShareRequest, layout: tuple[int, ...]) -> ShareAnswer:
        """Joins the cohort, once. `layout`: elements of each tensor; () for an evaluation."""
        old = self._turn(key)
        new, answer = peer.share(old, request, self._pins(), layout)
        self._store.advance(old, new, "share")
        return answer

    def mask(self, key: TurnKey, request: MaskRequest, write: Write) -> MaskAnswer:
        """Masks the update, once; `write` makes the file that is uploaded."""
        old = self._turn(key)
        new, masking = peer.mask(old, request, self._pins())
        self._store.advance(old, new, "mask")
        with_upload, answer = peer.uploaded(new, *write(masking))
        self._store.advance(new, with_upload, "upload")
        return answer

    def agree(self, key: TurnKey, request: AgreeRequest) -> AgreeAnswer:
        """Signs whose updates count, once."""
        old = self._turn(key)
        new, answer = peer.agree(old, request, self._pins(), self._me.sign)
        self._store.advance(old, new, "agree")
        return answer

    def unmask(self, key: TurnKey, request: UnmaskRequest) -> UnmaskAnswer:
        """Returns one kind of share of each neighbor, and deletes the secrets of the turn."""
        old = self._turn(key)
        new, answer = peer.unmask(old, request)
        self._store.advance(old, new, "unmask")
        return answer

    def _turn(self, key: TurnKey) -> Turn:
        state = self._store.get(key)
        if state is None:
            raise SecureRefused("order", "this peer has made no card for this turn")
        peer.check_rule(state, self._pins())  # which may have changed since an earlier step
        return state
