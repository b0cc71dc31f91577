"""The task "lora": adapters on a language model that every peer has in a folder of its own.

    commonweight-agent policy set models ~/models     # on each machine; ~/models/gpt2-small there
    commonweight run start lora --set model=gpt2-small

Only the adapters travel (and the head of a classification), under PEFT's own names. Before round 1
the peers compare the digests of their base models. `lora_settings` lists the settings.
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

from agent.data.disclosed_sets import Numbers, Use
from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, OnStep, Settings, TrainOutcome
from agent.tasks.language import base_model, lora_settings, next_token
from agent.tasks.language import tokens as text
from agent.tasks.language.base_model import AdaptedModel
from agent.tasks.language.lora_settings import LoraSettings
from agent.tasks.language.next_token import LogitsOf, Windows, split_windows
from agent.tasks.training import class_folders
from agent.tasks.training.classification import evaluate_classifier, predict_classes, to_tensors
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.seeds import derive_seed
from agent.tasks.training.torch_loop import Examples, autograd_step
from agent.tasks.training.torch_task import LastValue, LoopTask
from protocols.model.weights import Schema, Weights


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


class Lora(LoopTask):
    """The task."""

    forms = ("merged",)
    defaults = lora_settings.DEFAULTS

    def __init__(self) -> None:
        super().__init__()
        self._model = LastValue[AdaptedModel]()

    # --- model ---

    def schema(self, settings: Settings) -> Schema:
        return self._adapted(lora_settings.read_settings(settings)).schema

    def traits(self, settings: Settings) -> Mapping[str, Sequence[str]]:
        """The base model's digest and the classes. Reads the text, so that errors show early."""
        plan = lora_settings.read_settings(settings)
        self._read(plan)
        return {"base model": (self._digest(plan),), "classes": plan.classes}

    def init(self, seed: int, settings: Settings) -> Weights:
        """New adapters, which change nothing yet."""
        plan = lora_settings.read_settings(settings)
        made = base_model.load_adapted(self._folder(plan), plan, derive_seed("init", seed))
        named = dict(made.model.named_parameters())
        return Weights({n: named[p].detach().numpy() for n, p in made.parameters.items()})

    def _folder(self, plan: LoraSettings) -> Path:
        return base_model.find_folder(self._data, plan.model)

    def _digest(self, plan: LoraSettings) -> str:
        return base_model.digest(self._folder(plan), self._data.cache)

    def _adapted(self, plan: LoraSettings) -> AdaptedModel:
        def load() -> AdaptedModel:
            made = base_model.load_adapted(self._folder(plan), plan)
            made.model.to(self._device)
            return made

        return self._model.get(plan, load)

    def _output(self, of: AdaptedModel, w: Tensors, training: bool, **words: Any) -> Tensor:
        """The model's logits with the adapters `w`."""
        of.model.train(training)
        inner = {of.parameters[name]: tensor for name, tensor in w.items()}
        logits: Tensor = functional_call(of.model, inner, kwargs=words).logits
        return logits

    # --- data ---

    def load(self, data: DataSettings) -> None:
        """Store the data settings; the text is read when its tokens are known."""
        super().load(data)
        self._model = LastValue()

    def _read(self, plan: LoraSettings) -> Windows | _Texts:
        def read() -> Windows | _Texts:
            made = self._adapted(plan)
            if plan.kind == "classification":
                return _texts(self._data, plan, made)
            tokens = made.tokens._replace(digest=self._digest(plan))
            return split_windows(text.tokenize(self._data, tokens), plan.context)

        examples: Windows | _Texts = self._read_data.get(plan, read)
        return examples

    def rows_of(self, use: Use, settings: Settings) -> Numbers | None:
        """The numbers of the texts of a classification; other text has no rows."""
        found = self._read(lora_settings.read_settings(settings))
        if isinstance(found, Windows):
            return None
        return found.train_numbers if use == "train" else found.held_numbers

    def _rows(self, texts: _Texts, rows: Tensor) -> Examples:
        return Examples(rows.to(self._device), texts.labels[rows].to(self._device))

    # --- loop ---

    def train(self, weights: Weights, settings: Settings, on_step: OnStep) -> TrainOutcome:
        """Train with AdamW; the metric "loss" is the mean of the last epoch."""
        plan = lora_settings.read_settings(settings)
        adapted, found = self._adapted(plan), self._read(plan)
        if isinstance(found, Windows):
            loss_of = next_token.loss_of(self._next_token(adapted), found)
            starts = found.train.to(self._device)
            examples = Examples(starts, starts)
        else:
            logits_of = self._labels(adapted, found)

            def loss_of(w: Tensors, rows: Tensor, labels: Tensor) -> Tensor:
                return F.cross_entropy(logits_of(w, rows, True), labels)

            examples = self._rows(found, found.train)
        step = autograd_step(loss_of)
        return self._local.train(weights, self._hyperparameters(settings), examples, step, on_step)

    def evaluate(self, weights: Weights, settings: Settings, on_step: OnStep) -> EvalOutcome:
        """Mean "loss" and "accuracy", of the next token or of the class, on held-out examples."""
        plan, batch = lora_settings.read_settings(settings), self._hyperparameters(settings)
        adapted, found, size = self._adapted(plan), self._read(plan), batch.batch_size or 32
        if isinstance(found, Windows):
            return next_token.evaluate_next_token(
                self._next_token(adapted), weights, found, self._device, size, on_step
            )
        logits_of, rows = self._labels(adapted, found), self._rows(found, found.held_out)
        return evaluate_classifier(
            lambda w, x: logits_of(w, x, False), weights, rows, size, on_step
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
        """Continuations or classes of texts: of `source` itself, or of the files that it names."""
        plan = lora_settings.read_settings(settings)
        adapted, device = self._adapted(plan), self._device
        w = to_tensors(weights, device)
        for name, words in text.read_texts(source):
            answer: dict[str, Sequence[Any]] = {"file": [name], "text": [words]}
            if plan.kind == "causal":
                logits_of = self._next_token(adapted)
                answer["continuation"] = [
                    next_token.continue_text(logits_of, w, adapted.tokens, words, plan.context)
                ]
            else:
                tokens = list(adapted.tokens.encode(words)) or [adapted.tokens.end]
                x = torch.tensor(tokens[: plan.context], device=device)[None]
                answer |= predict_classes(self._output(adapted, w, False, input_ids=x).float())
                answer["class"] = [plan.classes[label] for label in answer["class"]]
            yield answer

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


def _texts(data: DataSettings, plan: LoraSettings, made: AdaptedModel) -> _Texts:
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
