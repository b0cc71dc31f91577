"""A language model of few numbers in a folder, as Hugging Face's own programs write it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)

SAYINGS = (
    "the quick brown fox jumps over the lazy dog",
    "a stitch in time saves nine",
    "all that glitters is not gold",
    "many hands make light work",
)


def write_model(folder: Path, seed: int = 0) -> None:
    """A Llama of two layers and its byte-pair tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(SAYINGS, trainer)
    tokens = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of base models with one in it, "tiny"."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "tiny")
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of text for each of two peers, and a cache."""
    for peer in ("one", "two"):
        (tmp_path / peer).mkdir()
        (tmp_path / f"{peer}-cache").mkdir()
        for number, saying in enumerate(SAYINGS):
            (tmp_path / peer / f"{number}.txt").write_text(f"{saying}. " * 30)
    return tmp_path
