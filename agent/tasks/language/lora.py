"""The task "lora": adapters on a language model that every peer has in a folder of its own.

    commonweight-agent policy set models ~/models     # on each machine; ~/models/gpt2-small there
    commonweight run start lora --set model=gpt2-small

Only the adapters travel (and the head of a classification), under PEFT's own names; that the base
model is the same everywhere is checked by its digest before round 1. The settings: `lora_plan`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, OnStep, Settings, TrainOutcome
from agent.tasks.language import base_model, lora_settings, next_token
from agent.tasks.language import tokens as text
from agent.tasks.language.base_model import AdaptedModel
from agent.tasks.language.lora_settings import LoraSettings
from agent.tasks.language.next_token import LogitsOf, Windows, split_windows
from agent.tasks.training import class_folders, devices
from agent.tasks.training.classification import evaluate_classifier
from agent.tasks.training.hyperparameters import read_hyperparameters
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.seeds import derive_seed
from agent.tasks.training.torch_loop import Examples, TrainingLoop, autograd_step
from protocols.model.weights import Schema, Weights


class _Texts(NamedTuple):
    """Texts of a classification: tokens int64[n, context] filled up with the pad, their lengths
    int64[n], labels int64[n], and which rows are trained on and held out."""

    tokens: Tensor
    lengths: Tensor
    labels: Tensor
    train: Tensor
    held_out: Tensor


class Lora:
    """The task. On a CPU the same inputs and number of threads give the same bytes."""

    version = "1"
    forms = ("merged",)

    def __init__(self) -> None:
        self._data = DataSettings()
        self._model: tuple[LoraSettings, AdaptedModel] | None = None
        self._examples: tuple[LoraSettings, Windows | _Texts] | None = None
        self._local = TrainingLoop()
        self.snapshot, self.restore = self._local.snapshot, self._local.restore
        self.load_optimizer_state = self._local.load_optimizer_state
        self.optimizer_state = self._local.optimizer_state

    # --- model ---

    def schema(self, settings: Settings) -> Schema:
        return self._adapted(lora_settings.read_settings(settings)).schema

    def traits(self, settings: Settings) -> Mapping[str, Sequence[str]]:
        """The base model's digest and the classes; reads the text, to tell faults early."""
        plan = lora_settings.read_settings(settings)
        self._read(plan)
        found = base_model.find_folder(self._data, plan.model)
        digest = base_model.digest(found, self._data.cache)
        return {"base model": (digest,), "classes": plan.classes}

    def init(self, seed: int, settings: Settings) -> Weights:
        """New adapters, which change nothing yet."""
        plan = lora_settings.read_settings(settings)
        found = base_model.find_folder(self._data, plan.model)
        made = base_model.load_adapted(found, plan, derive_seed("init", seed))
        named = dict(made.model.named_parameters())
        return Weights({n: named[p].detach().numpy() for n, p in made.parameters.items()})

    def _adapted(self, plan: LoraSettings) -> AdaptedModel:
        if self._model is None or self._model[0] != plan:
            self._model = None  # two models may not fit in memory
            found = base_model.find_folder(self._data, plan.model)
            made = base_model.load_adapted(found, plan)
            made.model.to(devices.select_device(self._data.device))
            self._model = plan, made
        return self._model[1]

    def _output(self, of: AdaptedModel, w: Tensors, training: bool, **words: Any) -> Tensor:
        """The model's logits with the adapters `w`."""
        of.model.train(training)
        inner = {of.parameters[name]: tensor for name, tensor in w.items()}
        logits: Tensor = functional_call(of.model, inner, kwargs=words).logits
        return logits

    # --- data ---

    def load(self, data: DataSettings) -> None:
        """Note which; the text is read when its tokens are known."""
        self._data, self._model, self._examples = data, None, None

    def _read(self, plan: LoraSettings) -> Windows | _Texts:
        if self._examples is None or self._examples[0] != plan:
            made = self._adapted(plan)
            found = base_model.find_folder(self._data, plan.model)
            tokens = made.tokens._replace(digest=base_model.digest(found, self._data.cache))
            if plan.kind == "causal":
                read = split_windows(text.tokenize(self._data, tokens), plan.context)
                self._examples = plan, read
            else:
                self._examples = plan, _texts(self._data.path, plan, made)
        return self._examples[1]

    # --- loop ---

    def train(self, weights: Weights, settings: Settings, on_step: OnStep) -> TrainOutcome:
        """AdamW on this peer's text; the metric "loss" is the mean of the last epoch."""
        plan, loop = (
            lora_settings.read_settings(settings),
            read_hyperparameters(settings, lora_settings.DEFAULTS),
        )
        of, found = self._adapted(plan), self._read(plan)
        device = devices.select_device(self._data.device)
        if isinstance(found, Windows):
            loss_of = next_token.loss_of(self._next_token(of), found)
            starts = found.train.to(device)
            examples = Examples(starts, starts)
        else:
            texts = found

            def loss_of(w: Tensors, rows: Tensor, labels: Tensor) -> Tensor:
                return F.cross_entropy(self._labels(of, texts)(w, rows, True), labels)

            examples = Examples(found.train.to(device), found.labels[found.train].to(device))
        return self._local.train(weights, loop, examples, autograd_step(loss_of), on_step)

    def evaluate(self, weights: Weights, settings: Settings, on_step: OnStep) -> EvalOutcome:
        """Mean "loss" and "accuracy", of the next token or of the class, on held-out examples."""
        plan, loop = (
            lora_settings.read_settings(settings),
            read_hyperparameters(settings, lora_settings.DEFAULTS),
        )
        of, found = self._adapted(plan), self._read(plan)
        device, batch = devices.select_device(self._data.device), loop.batch_size or 32
        if isinstance(found, Windows):
            return next_token.evaluate_next_token(
                self._next_token(of), weights, found, device, batch, on_step
            )
        logits_of = self._labels(of, found)
        rows = Examples(found.held_out.to(device), found.labels[found.held_out].to(device))
        return evaluate_classifier(
            lambda w, x: logits_of(w, x, False), weights, rows, batch, on_step
        )

    def _next_token(self, of: AdaptedModel) -> LogitsOf:
        return lambda w, x, training: self._output(of, w, training, input_ids=x, use_cache=False)

    def _labels(self, of: AdaptedModel, texts: _Texts) -> LogitsOf:
        """Rows of `texts` -> logits float32[n, classes]."""

        def logits(w: Tensors, rows: Tensor, training: bool) -> Tensor:
            lengths = texts.lengths[rows.cpu()]
            longest = int(lengths.max())
            tokens = texts.tokens[rows.cpu(), :longest].to(rows.device)
            mask = (torch.arange(longest) < lengths[:, None]).to(rows.device)
            made = self._output(of, w, training, input_ids=tokens, attention_mask=mask.long())
            return made.float()

        return logits

    @torch.inference_mode()
    def predict(
        self, weights: Weights, settings: Settings, source: str
    ) -> Iterator[Mapping[str, Sequence[Any]]]:
        """How texts go on, or their classes: `source` itself, or the files that it names."""
        plan = lora_settings.read_settings(settings)
        of, device = self._adapted(plan), devices.select_device(self._data.device)
        w = {name: torch.tensor(array, device=device) for name, array in weights.items()}
        for name, words in text.read_texts(source):
            tokens = list(of.tokens.encode(words)) or [of.tokens.end]
            told: dict[str, Sequence[Any]] = {"file": [name], "text": [words]}
            if plan.kind == "causal":
                after = next_token.generate(
                    self._next_token(of), w, tokens, of.tokens.end, plan.context
                )
                told["continuation"] = [of.tokens.decode(after)]
            else:
                x = torch.tensor(tokens[: plan.context], device=device)[None]
                chances = self._output(of, w, False, input_ids=x).float().softmax(1)
                told["class"] = [plan.classes[int(chances.argmax())]]
                told["probability"] = [float(chances.max())]
            yield told

    def export(
        self, weights: Weights, settings: Settings, form: str, data: DataSettings, out: Path
    ) -> None:
        """The base model with the adapters merged in: a folder for plain transformers."""
        plan = lora_settings.read_settings(settings)
        found = base_model.find_folder(data, plan.model)
        made = base_model.load_adapted(found, plan)
        named = dict(made.model.named_parameters())
        with torch.no_grad():
            for name, array in weights.items():
                named[made.parameters[name]].copy_(torch.tensor(array))
        base_model.save_merged(made, out, found)


def _texts(path: str, plan: LoraSettings, made: AdaptedModel) -> _Texts:
    """The texts in a folder for each class. Raises DataError."""
    found = class_folders.find_files(path, plan.classes, text.SUFFIXES)
    rows = [
        list(made.tokens.encode("".join(text.read_pieces(p))))[: plan.context] for p in found.paths
    ]
    lengths = np.array([len(row) for row in rows], np.int64)
    filled = np.full((len(rows), max(1, lengths.max())), made.pad, np.int64)
    for row, tokens in zip(filled, rows, strict=True):
        row[: len(tokens)] = tokens
    cut = class_folders.split_held_out(found.names, lengths > 0)
    return _Texts(*(torch.from_numpy(a) for a in (filled, lengths, found.labels, *cut)))
