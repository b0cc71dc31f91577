"""The task "lora": adapters on a language model that every peer has in a folder of its own.

    commonweight-agent policy set models ~/models     # on each machine; ~/models/gpt2-small there
    commonweight run start lora --set model=gpt2-small

Only the adapters travel (and the head of a classification), under PEFT's own names. Before round 1
the peers compare the digests of their base models. `lora_settings` lists the settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.data.disclosed_sets import Numbers, Use
from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, OnStep, TrainOutcome
from agent.tasks import Settings as RunSettings
from agent.tasks.language import base_model, lora_settings, next_token
from agent.tasks.language import tokens as text
from agent.tasks.language.base_model import AdaptedModel
from agent.tasks.language.lora_settings import LoraPlan
from agent.tasks.language.next_token import Windows, split_windows
from agent.tasks.training import class_folders, module_state
from agent.tasks.training.classification import evaluate_classifier, predict_classes
from agent.tasks.training.examples import FetchedExamples
from agent.tasks.training.loop_state import Tensors, as_weights
from agent.tasks.training.seeds import derive_seed
from agent.tasks.training.torch_loop import autograd_step
from agent.tasks.training.torch_task import LastValue, LoopTask
from protocols.model.built_in_settings import LoraSettings
from protocols.model.weights import Schema, Weights

#: Tokens int64[n, t], and a mask int64[n, t] that is 1 where they are text.
_Padded = tuple[Tensor, Tensor]


class _Texts(NamedTuple):
    """Texts of a classification: tokens int64[n, context] filled up with the pad, their lengths
    int64[n], labels int64[n], and which rows are trained on and held out; and the numbers of these
    over time, if this machine remembers them."""

    tokens: Tensor
    lengths: Tensor
    labels: Tensor
    train: Tensor
    held_out: Tensor
    train_numbers: Numbers | None
    held_numbers: Numbers | None

    def examples(self, rows: Tensor, device: torch.device) -> FetchedExamples:
        """These rows: tokens up to the longest text of a batch, with the mask; and labels."""

        def fetch(numbers: Tensor) -> _Padded:
            chosen = rows[numbers]
            lengths = self.lengths[chosen]
            longest = int(lengths.max())
            mask = torch.arange(longest) < lengths[:, None]
            return self.tokens[chosen, :longest], mask.long()

        return FetchedExamples(fetch, self.labels[rows], device)


class Lora(LoopTask):
    """The task."""

    forms = ("merged",)
    Settings = LoraSettings

    def __init__(self) -> None:
        super().__init__()
        self._model = LastValue[AdaptedModel]()

    # --- model ---

    def schema(self, settings: RunSettings) -> Schema:
        return self._adapted(lora_settings.read_settings(settings)).schema

    def traits(self, settings: RunSettings) -> Mapping[str, Sequence[str]]:
        """The base model's digest and the classes. Reads the text, so that errors show early."""
        plan = lora_settings.read_settings(settings)
        self._found(plan)
        return {"base model": (self._digest(plan),), "classes": plan.classes}

    def init(self, seed: int, settings: RunSettings) -> Weights:
        """New adapters, which change nothing yet."""
        plan = lora_settings.read_settings(settings)
        made = base_model.load_adapted(self._folder(plan), plan, derive_seed("init", seed))
        return as_weights(made.tensors())

    def _folder(self, plan: LoraPlan) -> Path:
        return base_model.find_folder(self._data, plan.model)

    def _digest(self, plan: LoraPlan) -> str:
        return base_model.digest(self._folder(plan), self._data.cache)

    def _adapted(self, plan: LoraPlan) -> AdaptedModel:
        def load() -> AdaptedModel:
            made = base_model.load_adapted(self._folder(plan), plan)
            made.model.to(self._device)
            return made

        return self._model.get(plan, load)

    def _ready(self, plan: LoraPlan, weights: Weights) -> tuple[AdaptedModel, Tensors]:
        """The model with these adapters in it, and they. Checkpointing computes a part of the model
        again when all else has ended, so they cannot be there for one call alone."""
        adapted = self._adapted(plan)
        tensors = adapted.tensors()
        module_state.load_tensors(tensors, weights)
        return adapted, tensors

    # --- data ---

    def load(self, data: DataSettings) -> None:
        """Store the data settings; the text is read when its tokens are known."""
        super().load(data)
        self._model = LastValue()

    def _found(self, plan: LoraPlan) -> Windows | _Texts:
        def read() -> Windows | _Texts:
            made = self._adapted(plan)
            if plan.kind == "classification":
                return _texts(self._data, plan, made)
            tokens = made.tokens._replace(digest=self._digest(plan))
            return split_windows(text.tokenize(self._data, tokens), plan.context)

        examples: Windows | _Texts = self._read_data.get(plan, read)
        return examples

    def rows_of(self, use: Use, settings: RunSettings) -> Numbers | None:
        """The numbers of the texts of a classification; other text has no rows."""
        found = self._found(lora_settings.read_settings(settings))
        if isinstance(found, Windows):
            return None
        return found.train_numbers if use == "train" else found.held_numbers

    # --- loop ---

    def train(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> TrainOutcome:
        """Train with AdamW; the metric "loss" is the mean of the last epoch."""
        plan = lora_settings.read_settings(settings)
        (adapted, tensors), found = self._ready(plan, weights), self._found(plan)
        if isinstance(found, Windows):
            loss_of = next_token.loss_of(partial(_next_token, adapted))
            examples = found.examples(found.train, self._device)
        else:

            def loss_of(w: Tensors, x: _Padded, labels: Tensor) -> Tensor:
                return F.cross_entropy(_labels(adapted, w, x, True), labels)

            examples = found.examples(found.train, self._device)
        step = autograd_step(loss_of, micro_batch=plan.micro_batch)
        hyper = self._hyperparameters(settings)
        trained = self._local.train(tensors, hyper, examples, step, on_step)
        # The model goes on to change its own tensors.
        return trained._replace(weights=as_weights({n: t.clone() for n, t in tensors.items()}))

    def evaluate(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> EvalOutcome:
        """Mean "loss" and "accuracy", of the next token or of the class, on held-out examples."""
        plan, batch = lora_settings.read_settings(settings), self._hyperparameters(settings)
        (adapted, _), found = self._ready(plan, weights), self._found(plan)
        size = batch.batch_size or 32
        if isinstance(found, Windows):
            logits_of = self._inference(settings, partial(_next_token, adapted))
            return next_token.evaluate_next_token(
                logits_of, weights, found, self._device, size, on_step
            )
        labels_of = self._inference(settings, lambda w, x: _labels(adapted, w, x, False))
        examples = found.examples(found.held_out, self._device)
        return evaluate_classifier(labels_of, weights, examples, size, on_step)

    @torch.inference_mode()
    def predict(
        self, weights: Weights, settings: RunSettings, source: str
    ) -> Iterator[Mapping[str, Sequence[Any]]]:
        """Continuations or classes of texts: of `source` itself, or of the files that it names."""
        plan = lora_settings.read_settings(settings)
        adapted, w = self._ready(plan, weights)
        next_of = self._inference(settings, partial(_next_token, adapted))
        labels_of = self._inference(settings, partial(_labels, adapted))
        for name, words in text.read_texts(source):
            answer: dict[str, Sequence[Any]] = {"file": [name], "text": [words]}
            if plan.kind == "causal":
                answer["continuation"] = [
                    next_token.continue_text(next_of, w, adapted.tokens, words, plan.context)
                ]
            else:
                tokens = list(adapted.tokens.encode(words)) or [adapted.tokens.end]
                x = torch.tensor(tokens[: plan.context], device=self._device)[None]
                answer |= predict_classes(labels_of(w, (x, torch.ones_like(x)), False))
                answer["class"] = [plan.classes[label] for label in answer["class"]]
            yield answer

    def export(
        self, weights: Weights, settings: RunSettings, form: str, data: DataSettings, out: Path
    ) -> None:
        """The base model with the adapters merged in: a folder for plain transformers."""
        plan = lora_settings.read_settings(settings)
        found = base_model.find_folder(data, plan.model)
        made = base_model.load_adapted(found, plan)
        module_state.load_tensors(made.tensors(), weights)
        base_model.save_merged(made, out, found)


def _next_token(of: AdaptedModel, w: Tensors, x: Tensor, training: bool) -> Tensor:
    """Tokens int64[n, t] -> logits [n, t, vocabulary], by the adapters in the model."""
    logits: Tensor = of.model.train(training)(input_ids=x, use_cache=False).logits
    return logits


def _labels(of: AdaptedModel, w: Tensors, x: _Padded, training: bool) -> Tensor:
    """Texts -> logits float32[n, classes], by the adapters in the model."""
    tokens, mask = x
    logits: Tensor = of.model.train(training)(input_ids=tokens, attention_mask=mask).logits
    return logits.float()


def _texts(data: DataSettings, plan: LoraPlan, made: AdaptedModel) -> _Texts:
    """The texts in a folder for each class. Raises DataError."""
    found, numbers = class_folders.admit(
        class_folders.find_files(data.path, plan.classes, text.SUFFIXES), data
    )
    rows = [
        list(made.tokens.encode("".join(text.read_pieces(p))))[: plan.context] for p in found.paths
    ]
    lengths = np.array([len(row) for row in rows], np.int64)
    filled = np.full((len(rows), max(1, lengths.max())), made.pad, np.int64)
    for row, tokens in zip(filled, rows, strict=True):
        row[: len(tokens)] = tokens
    train, held_out = class_folders.split(found, lengths > 0, numbers, data)
    return _Texts(
        torch.from_numpy(filled),
        torch.from_numpy(lengths),
        torch.from_numpy(found.labels),
        torch.from_numpy(train),
        torch.from_numpy(held_out),
        train_numbers=None if numbers is None else numbers[train],
        held_numbers=None if numbers is None else numbers[held_out],
    )
