"""Real ClientApps that train with the real loop, and what an attacker gets from them.

The tasks are in this process, with rows that the test chooses. A plain update, or the sum of a
secure run, is read as the coordinator reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.clientapp.app import CLAIM
from agent.tasks import OnStep, TrainOutcome
from agent.tasks.training.hyperparameters import read_hyperparameters
from agent.tasks.training.torch_loop import Examples, PrivateLoss, TrainingLoop, autograd_step
from agent.tasks.work import Done
from protocols.messages.work import SIGNED_CLAIM
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.privacy import events, private_training
from protocols.privacy.events import Event
from protocols.privacy.private_training import PrivateTraining
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.cohort import open_card
from protocols.privacy.secagg.messages import ShareRequest, decode_ready, encode
from protocols.privacy.shared_noise import SharedNoise
from tests.support.in_process_trainer import ByKind
from tests.support.secure_desks import RUN, Room, message

Floats = npt.NDArray[np.float64]
#: By tensor.
Gradients = dict[str, Floats]
#: Of a secure run: the largest norm of an update.
CLIP_NORM = 10.0
#: One step over all rows; an update is the mean gradient times -LR.
LR = 1.0
STEP: dict[str, Any] = {"batch_size": 0, "epochs": 1, "lr": LR}


class TorchTask(Protocol):
    """What of a task with the training loop is needed here."""

    def protect(self, private: PrivateTraining | None) -> None: ...
    def spent(self) -> tuple[Event, ...]: ...
    def train(self, weights: Weights, settings: Any, on_step: OnStep) -> TrainOutcome: ...


class Canaries(TrainingLoop):
    """A task whose rows are their own gradients, for any weights: the strongest rows there are.

    `rows`: float32[n, d]. The model is a tensor "w" float32[1, d].
    """

    def __init__(self, rows: npt.NDArray[np.float32]) -> None:
        super().__init__()
        self._rows = Examples(torch.from_numpy(rows), torch.zeros(len(rows)))

    def train(self, start: Weights, settings: Any, on_step: OnStep) -> TrainOutcome:  # type: ignore[override]
        def losses(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.linear(x, w["w"])[:, 0]

        return super().train(
            start,
            read_hyperparameters(settings),
            self._rows,
            autograd_step(lambda w, x, y: losses(w, x, y).mean()),
            on_step,
            private_loss=PrivateLoss(losses),
        )


class LoopTrainer(ByKind):
    """Trains a task, with noise if the work asks for it."""

    def __init__(self, task: TorchTask) -> None:
        self.task = task

    def train(self, task: str, settings: Any, base: Path, out: Path) -> Done:
        hidden = private_training.SETTINGS | {"seed", "round"}
        own = {name: value for name, value in settings.items() if name not in hidden}
        self.task.protect(private_training.read(settings))
        made = self.task.train(weights.load(base), own, lambda *told: None)
        digest = weights.save(made.weights, out)
        spent = self.task.spent()
        return Done(
            digest=digest,
            nbytes=out.stat().st_size,
            num_examples=made.num_examples,
            metrics=made.metrics,
            privacy=events.encode(spent).decode() if spent else "",
        )


class Wards(Room):
    """Peers with these tasks, and the model `start`, which the attacker chose.

    `private`: the noise of the run.
    """

    def __init__(
        self,
        folder: Path,
        start: Weights,
        tasks: Sequence[TorchTask],
        private: PrivateTraining | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(folder, len(tasks))
        self.start, file = start, self._versions / "unnamed"
        self.base = weights.save(start, file)
        file.rename(self._versions / self.base)
        self.private, self._turns = private, itertools.count()
        self._settings = {**STEP, **settings, **(private.settings() if private else {})}
        self.change_rows(tasks)

    def change_rows(self, tasks: Sequence[TorchTask]) -> None:
        """From now on, the peers have these rows."""
        for desk, task in zip(self.desks.values(), tasks, strict=True):
            desk.trainer = LoopTrainer(task)  # type: ignore[assignment]
            desk.made_again()

    def plain(self, peer: int) -> Gradients:
        """The sum of the gradients of a peer's rows, from its plain update."""
        desk = list(self.desks.values())[peer]
        work = self.work(
            "train", codec="fp32", settings=self._settings, round=1 + next(self._turns)
        )
        reply = desk.client.handle(message(work, key=self.site.key))
        payload = reply.content.config_records[CLAIM]["claim"]
        assert isinstance(payload, bytes)
        claim = SIGNED_CLAIM.decode(payload)
        file = self._folder / "plain.safetensors"
        file.write_bytes(desk.uploads[claim.digest])
        return self._gradients(weights.load(file), claim.num_examples)

    def secure(self, *, lost: Sequence[int] = (), run: str = RUN) -> Gradients:
        """The sum of the gradients of all rows, from a secure sum.

        `lost`: peers that are not there.
        """
        turn = next(self._turns)
        there = [d for number, d in enumerate(self.desks.values()) if number not in lost]
        work = self.work("train", run=run, settings=self._settings, turn=turn)
        answers = [decode_ready(desk.ask(work)[1]) for desk in there]
        cards = tuple(answer.card for answer in answers)
        examples = [open_card(card).examples for card in cards]
        plan = self.plan(names=answers[0].names, **self._limits(examples))
        state = Aggregator(CohortFixed(request=ShareRequest(plan=encode(plan), cards=cards)))
        for decide in (state.fix_sharers, state.fix_survivors, None, None):
            self.play(state, there, turn)
            if decide:
                state.apply(decide())
        mean, _ = self.mean(state, self._folder)
        return self._gradients(mean, sum(examples))

    def _limits(self, examples: Sequence[int]) -> dict[str, Any]:
        """The limits and weights of a plan, as `coordinator.runs.secure.plans` chooses them."""
        sizes = self.plan().sizes
        if self.private is None or not self.private.is_shared:
            return {"limits": (CLIP_NORM,) * len(sizes), "clip": CLIP_NORM, "max_weight": 256}
        noise = SharedNoise.of(self.private.shared_event(LR))
        divisor = sum(examples) / len(examples)
        return {
            "limits": (1.01 * noise.largest(max(examples)) / divisor,) * len(sizes),
            "clip": 1.01 * noise.longest(max(examples), sum(sizes)) / divisor,
            "max_weight": 1,
            "divisor": divisor,
        }

    def _gradients(self, mean: Weights, examples: int) -> Gradients:
        return {n: (np.float64(self.start[n]) - mean[n]) * examples / LR for n in mean}
