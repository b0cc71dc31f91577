"""The task "lora": adapters on a language model that every peer has in a folder of its own.

    commonweight-agent policy set models ~/models     # on each machine; ~/models/gpt2-small there
    commonweight run start lora --set model=gpt2-small

Only the adapters travel (and the head of a classification), under PEFT's own names: of each the
factor B, as A is the same on all peers. With `aggregation=average`, A is trained and sent too, and
the mean of the products is not the product of the means. Before round 1 the peers compare the
digests of their base models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.data import conversations
from agent.data.conversations import Message
from agent.data.disclosed_sets import Numbers, Use
from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, OnStep, TrainOutcome
from agent.tasks import Settings as RunSettings
from agent.tasks.language import base_model, factored
from agent.tasks.language import tokens as text
from agent.tasks.language.base_model import AdaptedModel
from agent.tasks.language.chat import Question, fill_rows
from agent.tasks.language.next_token import NextTokenTask, split_windows
from agent.tasks.language.tokens import Tokenizer
from agent.tasks.training import class_folders, module_state
from agent.tasks.training.classification import predict_classes
from agent.tasks.training.examples import Batch, FetchedExamples
from agent.tasks.training.loop_state import Tensors, as_weights
from agent.tasks.training.seeds import derive_seed
from agent.tasks.training.task_settings import TaskSettings
from agent.tasks.training.torch_task import LastValue
from protocols.errors import DataError, UsageError
from protocols.model.built_in_settings import LoraSettings
from protocols.model.weights import Schema, Weights

Sources = tuple[FetchedExamples, FetchedExamples]
_CPU = torch.device("cpu")
#: The settings on which the model depends.
_OF_MODEL = (
    *("model", "kind", "classes", "rank", "alpha", "dropout", "targets", "checkpointing"),
    *("aggregation", "digest", "quantized"),
)
#: Tokens that a generated answer may have beyond the right one.
_MORE_TOKENS = 8


class Lora(NextTokenTask):
    """The task."""

    forms = ("merged",)
    Settings = LoraSettings
    _reads = ("model", "kind", "classes", "context", "packing", "exact_match", "digest")

    def __init__(self) -> None:
        super().__init__()
        self._base = LastValue[AdaptedModel]()
        #: The inputs of the first factors of a round.
        self._first: tuple[object, ...] = ()
        #: Of conversations: held-out ones whose answers an evaluation generates.
        self._questions: list[Question] = []
        self._is_chat = False
        #: Of the texts of a classification; other text has no rows.
        self._numbers: Mapping[Use, Numbers | None] = {}

    # --- model ---

    def load(self, data: DataSettings) -> None:
        """Store the data settings; the text is read when its tokens are known."""
        super().load(data)
        self._base = LastValue()

    def _read(self, settings: RunSettings) -> TaskSettings:
        """All settings, with the classes as a tuple, which is empty without a classification.

        Runs and models without `aggregation` are from versions that averaged A and B.
        """
        read = super()._read({"aggregation": "average", **settings})
        self._is_chat = read.kind == "chat"
        if not read.model:
            raise UsageError(
                "a run of lora names its base model", "the folder's name: --set model=NAME"
            )
        if read.rank == 0 and read.aggregation not in factored.WAYS:
            raise UsageError(
                f"with aggregation={read.aggregation}, all peers have adapters of one rank",
                "--set rank=8, or --set aggregation=stack with rank=auto",
            )
        has_classes = read.kind == "classification"
        classes = class_folders.parse_classes(read.classes) if has_classes else ()
        return TaskSettings({**read, "classes": classes})

    def traits(self, settings: RunSettings) -> Mapping[str, Sequence[str]]:
        """The base model's digest and the classes. Reads the text, so that errors show early."""
        self._sets(settings)
        read = self._read(settings)
        digest = self._digest(read)
        base_model.check_digest(read, digest)
        told = {"base model": (digest,), "classes": read.classes}
        if read.kind == "chat":
            template = self._adapted(read).chat.template
            told["chat template"] = (hashlib.sha256(template.encode()).hexdigest()[:16],)
        return told

    def _folder(self, read: TaskSettings) -> Path:
        return base_model.find_folder(self._data, read.model)

    def _digest(self, read: TaskSettings) -> str:
        return base_model.digest(self._folder(read), self._data.cache)

    def _adapted(self, read: TaskSettings) -> AdaptedModel:
        def load() -> AdaptedModel:
            memory = factored.memory_bytes(self._device)
            base_model.check_digest(read, self._digest(read))
            # Tensors of an evaluation that is the first to need the model could not be trained.
            with torch.inference_mode(False):
                found = base_model.load_adapted(self._folder(read), read, 0, memory)
            if read.quantized == "no":
                return found.to(self._device)
            for one in found.added:  # bitsandbytes has put the rest there, permanently
                one.to(self._device)
            return found

        return self._base.get(tuple(read[name] for name in _OF_MODEL), load)

    def _build(self, settings: RunSettings, *words: object) -> nn.Module:
        """The loaded model, which stays; with words, one with new adapters.

        Gradient checkpointing computes a part of it again later, so adapters cannot be added for
        one call alone.
        """
        read = self._read(settings)
        if words:
            seed, memory = derive_seed(*words), factored.memory_bytes(self._device)
            return base_model.load_adapted(self._folder(read), read, seed, memory)
        return self._adapted(read).train()

    def _tensors(self, model: nn.Module) -> Tensors:
        assert isinstance(model, AdaptedModel)
        return model.tensors()

    def _idle_model(self, settings: RunSettings) -> nn.Module:
        model = super()._idle_model(settings)
        assert isinstance(model, AdaptedModel)
        for one in model.added:
            one.show()
        return model

    def _filled(self, model: nn.Module, weights: Weights) -> Tensors:
        """The trained parameters, set to this version."""
        assert isinstance(model, AdaptedModel)
        if not model.added:
            return super()._filled(model, weights)
        module_state.load_tensors(model.tensors(), weights)
        for one in model.added:
            one.begin(*self._first)
        return dict(sorted(model.trained().items()))

    def sums_schema(self, weights: Weights, settings: RunSettings) -> Schema | None:
        """Of an update, if it is made of factors of this peer's rank."""
        model = self._adapted(self._read(settings))
        return module_state.schema_of(model.trained()) if model.added else None

    # --- data ---

    def data(self, source: DataSettings, settings: Any) -> Sources:
        made, self._numbers, self._questions = self._adapted(settings), {}, []
        if settings.kind == "classification":
            return self._texts(source, settings, made)
        if settings.kind == "chat":
            return self._conversations(source, settings, made)
        tokens = made.tokens._replace(digest=self._digest(settings))
        windows = split_windows(text.tokenize(source, tokens), settings.context)
        return windows.sources(self._device)

    def _conversations(
        self, source: DataSettings, settings: TaskSettings, made: AdaptedModel
    ) -> Sources:
        """Rows of conversations. Raises DataError."""
        parts: tuple[list[Any], list[Any]] = ([], [])
        self._questions = []
        for said in conversations.read(source.path):
            is_held = conversations.is_held_out(said)
            parts[is_held].append(made.chat.segments(said))
            if is_held and len(self._questions) < settings.exact_match:
                self._questions.append(made.chat.question(said))
        rows = [
            fill_rows(part, settings.context, made.pad, packing=settings.packing) for part in parts
        ]
        if not all(len(part.tokens) for part in rows):
            raise DataError(
                "there are too few conversations to train on some and hold out others, or their "
                f"answers begin beyond {settings.context} tokens",
                f"{source.path}: {sum(map(len, parts))} conversations, {rows[0].left_out} of them "
                "too long; more of them, or a larger --set context",
            )
        train, held_out = (part.examples(self._device) for part in rows)
        return train, held_out

    def loss(self, output: Any, target: Any) -> Tensor:
        """As of all texts; of conversations the mean over examples of that over their answers."""
        if output.dim() == 2 or not self._is_chat:
            return super().loss(output, target)
        losses = F.cross_entropy(output.float().transpose(1, 2), target, reduction="none")
        means: Tensor = losses.sum(1) / (target >= 0).sum(1).clamp(min=1)
        return means.mean()

    def metrics(self, output: Any, target: Any) -> Mapping[str, Any]:
        """The "accuracy" of tokens or texts."""
        if output.dim() == 2 or not self._is_chat:
            return super().metrics(output, target)
        right = (output.argmax(-1) == target).sum(1)
        return {"accuracy": (right / (target >= 0).sum(1).clamp(min=1)).cpu().double().mean()}

    def evaluate(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> EvalOutcome:
        """As of all texts. With `exact_match`, the share of held-out answers that the model gives
        word for word, each token the most probable one."""
        found = super().evaluate(weights, settings, on_step)
        if not self._questions:
            return found
        read, right = self._read(settings), 0
        with torch.inference_mode():
            call = self._ready(weights, settings)
            for prompt, answer in self._questions:
                most = len(self._tokenizer(read).encode(answer)) + _MORE_TOKENS
                right += self._continuation(call, prompt, read, most).strip() == answer.strip()
        matched = {"exact_match": right / len(self._questions)}
        return found._replace(metrics={**found.metrics, **matched})

    def _texts(self, source: DataSettings, settings: Any, made: AdaptedModel) -> Sources:
        """The texts in a folder for each class: tokens int64[n, t] up to the longest text of a
        batch, with a mask int64[n, t] that is 1 where they are text; and labels. Raises DataError.
        """
        files = class_folders.find_files(source.path, settings.classes, text.SUFFIXES)
        found, numbers = class_folders.admit(files, source)
        rows = [
            list(made.tokens.encode("".join(text.read_pieces(p))))[: settings.context]
            for p in found.paths
        ]
        sizes = np.array([len(row) for row in rows], np.int64)
        filled = np.full((len(rows), max(1, sizes.max())), made.pad, np.int64)
        for row, tokens in zip(filled, rows, strict=True):
            row[: len(tokens)] = tokens
        train, held_out = class_folders.split(found, sizes > 0, numbers, source)
        if numbers is not None:
            self._numbers = {"train": numbers[train], "held": numbers[held_out]}
        whole, lengths, labels = map(torch.from_numpy, (filled, sizes, found.labels))

        def examples(part: Tensor) -> FetchedExamples:
            def read(numbers: Tensor) -> Batch:
                chosen = part[numbers]
                longest = int(lengths[chosen].max())
                mask = torch.arange(longest) < lengths[chosen][:, None]
                return (whole[chosen, :longest], mask.long()), labels[chosen]

            return FetchedExamples(read, len(part), self._device)

        return examples(torch.from_numpy(train)), examples(torch.from_numpy(held_out))

    def rows_of(self, use: Use, settings: RunSettings) -> Numbers | None:
        self._sets(settings)
        return self._numbers.get(use)

    # --- training and predictions ---

    def _micro_batch(self, settings: RunSettings) -> int:
        return int(self._read(settings).micro_batch)

    def train(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> TrainOutcome:
        """Train the adapters; the metric "loss" is the mean of the last epoch."""
        self._first = settings.get("seed", 0), settings.get("round", 0), self._data.index
        trained = super().train(weights, settings, on_step)
        model = self._adapted(self._read(settings))
        # Clones, because the model changes its own later.
        update = dict(as_weights({n: t.clone() for n, t in model.trained().items()}))
        for one in model.added:
            update |= one.update(update)
        return trained._replace(weights=Weights(update))

    def _tokenizer(self, settings: Any) -> Tokenizer:
        return self._adapted(settings).tokens

    def _answer(
        self, call: Callable[[Any], Any], x: Any, settings: Any
    ) -> Mapping[str, Sequence[Any]]:
        """A continuation or a class of the text x."""
        if settings.kind == "causal":
            return super()._answer(call, x, settings)
        if settings.kind == "chat":
            turns = (Message("user", x), Message("assistant", ""))
            prompt = self._adapted(settings).chat.question(turns).prompt
            return {"continuation": [self._continuation(call, prompt, settings)]}
        made = self._tokenizer(settings)
        tokens = (list(made.encode(x)) or [made.end])[: settings.context]
        row = torch.tensor(tokens, device=self._device)[None]
        found = predict_classes(call((row, torch.ones_like(row))))
        return {**found, "class": [settings.classes[label] for label in found["class"]]}

    def export(
        self, weights: Weights, settings: RunSettings, form: str, data: DataSettings, out: Path
    ) -> None:
        """The base model with the adapters merged in: a folder for plain transformers."""
        read = self._read(settings)
        found = base_model.find_folder(data, read.model)
        read = TaskSettings({**read, "quantized": "no"})
        made = base_model.load_adapted(found, read, memory_bytes=factored.memory_bytes(_CPU))
        module_state.load_tensors(made.tensors(), weights)
        base_model.save_merged(made, out, found)
