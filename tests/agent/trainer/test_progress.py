"""What happens between two batches: reports, and how often they read the loss."""

from __future__ import annotations

import pytest

from agent.trainer.ipc import Answer, Pace, Progress
from agent.trainer.progress import StepCallback, WorkControl


class OnCard:
    """A loss that is computed elsewhere, and counts how often somebody waits for it."""

    reads = 0

    def __float__(self) -> float:
        OnCard.reads += 1
        return 0.5


@pytest.mark.parametrize("share", [1.0, 0.99])
def test_the_loss_is_read_only_for_reports_unless_the_owner_limits_the_time(share: float) -> None:
    """With a limit, the time of each step is measured to its end."""
    OnCard.reads, control, sent = 0, WorkControl(), list[Answer]()
    control.apply(Pace(work_fraction=share))
    on_step = StepCallback(1, "train", control, sent.append)
    for step in range(1, 51):
        on_step(step, 50, OnCard(), step)
    told = [each.loss for each in sent if isinstance(each, Progress)]
    assert told == [0.5] * len(sent)
    assert len(sent) >= 2
    assert OnCard.reads == len(sent) + (50 if share < 1 else 0)
