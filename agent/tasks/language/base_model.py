"""A local Hugging Face model folder, with the adapters that a run trains.

It reads local files only, never the hub; safetensors only, no pickle; and it runs no code of the
folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agent.data.settings import DataSettings
from agent.tasks.language import factored
from agent.tasks.language.chat import ChatFormat
from agent.tasks.language.factored import Added
from agent.tasks.language.tokens import Tokenizer
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.seeds import random_state
from agent.tasks.training.task_settings import TaskSettings
from protocols.codecs.factors import AUTO_RANK
from protocols.errors import DataError, SchemaMismatch, UsageError
from protocols.extras import needs_extra
from protocols.local.atomic_files import replacing

#: The files that define a model: weights, configuration and tokenizer.
_COUNTED = re.compile(
    r"config\.json|.*\.safetensors|.*\.safetensors\.index\.json|.*\.model"
    r"|tokenizer\.json|vocab\.(json|txt)|merges\.txt|added_tokens\.json"
)
_MODELS = "commonweight-agent policy set models FOLDER"


class AdaptedModel(nn.Module):
    """The base model with adapters: tokens int64[n, t] -> logits [n, t, vocabulary]; with a mask
    int64[n, t], as of a classification, logits float32[n, classes]. `positions` int64[n, t] start
    at 0 with each conversation of a row, and attention stays within it.

    `names` maps the names with which adapters travel (those of PEFT) to those in `model`. `added`:
    what versions add to layers, if they do not hold the adapters themselves (`factored`).
    """

    def __init__(
        self,
        model: Any,
        tokens: Tokenizer,
        pad: int,
        names: Mapping[str, str],
        added: nn.ModuleList,
        chat: ChatFormat,
    ) -> None:
        super().__init__()
        self.model, self.tokens, self.pad, self._names = model, tokens, pad, names
        self.chat = chat
        self.added: Sequence[Added] = added  # type: ignore[assignment]

    def trained(self) -> Tensors:
        """The parameters that are trained, by the names of an update."""
        named = dict(self.model.named_parameters())
        return {name: named[inner] for name, inner in self._names.items()}

    def tensors(self) -> Tensors:
        """The tensors of a version themselves, by the names with which they travel."""
        if not self.added:
            return self.trained()
        own = {name for one in self.added for name in one.trained()}
        rest = {name: tensor for name, tensor in self.trained().items() if name not in own}
        return rest | {name: t for one in self.added for name, t in one.travelling().items()}

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Any:
        if mask is None:
            return self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        return self.model(input_ids=tokens, attention_mask=mask).logits.float()


def find_folder(data: DataSettings, name: str) -> Path:
    """The folder of the model `name`. Raises DataError if there is no usable one."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise DataError(
            "a base model is named by one folder's name",
            "--set model=NAME, such as model=gpt2-small",
        )
    if not data.models:
        raise DataError("this machine has no folder of base models", _MODELS)
    found = Path(data.models) / name
    if not (found / "config.json").is_file():
        raise DataError(
            f"this machine has no base model {name}", f"there is no {found}/config.json; {_MODELS}"
        )
    if not any(found.glob("*.safetensors")):
        pickled = next((p.name for p in (*found.glob("*.bin"), *found.glob("*.pt"))), "")
        raise DataError(
            f"the folder of the base model {name} has no weights in safetensors",
            f"{pickled or 'nothing'} is in {found}; "
            "model.save_pretrained(FOLDER) of transformers writes them so",
        )
    return found


def digest(found: Path, cache: str) -> str:
    """SHA-256 (hex) of names and bytes of the model's files; stored in `cache`."""
    files = sorted(p for p in found.iterdir() if _COUNTED.fullmatch(p.name) and p.is_file())
    stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    kept = Path(cache) / f"base-{key[:32]}.sha256" if cache else None
    if kept is not None and kept.exists() and len(told := kept.read_text()) == 64:
        return told
    sha = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            inner = hashlib.file_digest(file, "sha256").hexdigest()
        sha.update(f"{path.name} {inner}\n".encode())
    if kept is not None:
        with replacing(kept) as file:
            file.write(sha.hexdigest().encode())
    return sha.hexdigest()


def check_digest(plan: TaskSettings, found: str) -> None:
    """Raise SchemaMismatch if the run names another base model by its digest."""
    if plan.digest and plan.digest != found:
        raise SchemaMismatch(
            "base model",
            plan.digest[:12],
            found[:12],
            f"the folder {plan.model} that the others have, or --set digest={found}",
        )


def load_adapted(
    found: Path, plan: TaskSettings, seed: int = 0, memory_bytes: int = 0
) -> AdaptedModel:
    """Load the model and add new adapters, initialized from `seed`. `plan`: the settings of lora.
    `memory_bytes`: that of the device, by which a rank of 0 is chosen.

    Raises MissingPackage, DataError.
    """
    peft, transformers = _libraries()
    kind = {
        "causal": transformers.AutoModelForCausalLM,
        "chat": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
    }[plan.kind]
    extra = {"num_labels": len(plan.classes)} if plan.kind == "classification" else {}
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        base = kind.from_pretrained(
            found,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="auto",
            **extra,
            **_quantized(transformers, plan.quantized),
        )
        tokens = transformers.AutoTokenizer.from_pretrained(
            found, local_files_only=True, trust_remote_code=False
        )
        if plan.quantized != "no":
            base = peft.prepare_model_for_kbit_training(
                base, use_gradient_checkpointing=plan.checkpointing
            )
        model = _with_adapters(peft, base, plan, memory_bytes)
        names = dict(_travelling(peft, model))
        added = nn.ModuleList()
        if plan.aggregation == "ffa":
            names = _fix_projections(model, names)
        elif plan.aggregation in factored.WAYS:
            added = factored.add_to(model, names, plan.rank or AUTO_RANK, plan.aggregation)
        if plan.checkpointing and hasattr(base, "activation_checkpointing_enable"):
            base.activation_checkpointing_enable()
        elif plan.checkpointing:  # its name in older transformers
            base.gradient_checkpointing_enable({"use_reentrant": False})
    except (MemoryError, torch.OutOfMemoryError, DataError, UsageError):
        raise
    except Exception as err:  # a damaged folder can raise any error
        raise DataError(
            f"the base model {found.name} cannot be used: {type(err).__name__}",
            f"{found}: {' '.join(str(err).split())[:400]}",
        ) from err
    finally:
        torch.set_rng_state(state)
    end = next((t for t in (tokens.eos_token_id, tokens.sep_token_id) if t is not None), 0)
    pad = tokens.pad_token_id if tokens.pad_token_id is not None else end
    base.config.pad_token_id = pad

    def encode(text: str) -> Any:
        return tokens(text, add_special_tokens=plan.kind == "classification").input_ids

    made = Tokenizer(encode, tokens.decode, len(tokens), end, "")
    return AdaptedModel(model, made, pad, names, added, ChatFormat(tokens, end))


def save_merged(of: AdaptedModel, out: Path, found: Path) -> None:
    """Write the base model with merged adapters, in the format of transformers."""
    _, transformers = _libraries()
    for one in of.added:
        one.merge()
    of.model.merge_and_unload().save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(found, local_files_only=True).save_pretrained(out)


def _quantized(transformers: Any, how: str) -> dict[str, Any]:
    """Arguments that load a base model in few bits. Raises DataError where that does not work."""
    if how == "no":
        return {}
    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        lacks = "bitsandbytes" if torch.cuda.is_available() else "an NVIDIA graphics card"
        raise DataError(
            f"this machine cannot hold a base model as {how}: it lacks {lacks}",
            "pip install bitsandbytes, on a machine with such a card; or --set quantized=no",
        )
    if how == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def _with_adapters(peft: Any, base: Any, plan: TaskSettings, memory_bytes: int) -> Any:
    """The base model with adapters of the rank of the settings, or of this device's memory."""
    rank = plan.rank
    if not rank:
        one = peft.get_peft_model(base, _adapters(peft, plan, 1))
        rank = factored.rank_for(
            memory_bytes, sum(p.numel() for name, p in one.named_parameters() if ".lora_" in name)
        )
        base = one.unload()
    return peft.get_peft_model(base, _adapters(peft, plan, rank))


def _adapters(peft: Any, plan: TaskSettings, rank: int) -> Any:
    targets = {"": None, "all-linear": "all-linear"}.get(plan.targets, plan.targets.split(","))
    return peft.LoraConfig(
        task_type={"causal": "CAUSAL_LM", "chat": "CAUSAL_LM", "classification": "SEQ_CLS"}[
            plan.kind
        ],
        r=rank,
        lora_alpha=plan.alpha,
        lora_dropout=plan.dropout,
        target_modules=targets,
    )


def _fix_projections(model: Any, names: Mapping[str, str]) -> dict[str, str]:
    """Set each A to a value derived from its name alone, and freeze it. Returns the other names.

    With one A on all peers and in all rounds, the mean of B times A is the product of the mean B
    (FFA-LoRA: Sun et al. 2024, arXiv 2403.12313). The range is that of PEFT's own first values.
    Raises UsageError for adapters of embeddings, whose A begins as 0.
    """
    parameters = dict(model.named_parameters())
    for name, inner in names.items():
        if "lora_embedding" in name:
            raise UsageError(
                "aggregation=ffa cannot adapt an embedding", "--set aggregation=average"
            )
        if ".lora_A." in name:
            fixed = parameters[inner]
            bound = 1 / math.sqrt(math.prod(fixed.shape[1:]))
            values = random_state("lora A", name).uniform(-bound, bound, tuple(fixed.shape))
            fixed.requires_grad_(False).copy_(torch.from_numpy(values))
    return {name: inner for name, inner in names.items() if parameters[inner].requires_grad}


def _travelling(peft: Any, model: Any) -> Iterator[tuple[str, str]]:
    """Names in PEFT's files, and the names of their parameters."""
    trained = {p.data_ptr(): name for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in peft.get_peft_model_state_dict(model).items():
        if tensor.data_ptr() in trained:
            yield name, trained[tensor.data_ptr()]


def _libraries() -> tuple[Any, Any]:
    """peft and transformers, in offline mode. Raises MissingPackage."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with needs_extra("lora", "the task lora"):
        import peft
        import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return peft, transformers
