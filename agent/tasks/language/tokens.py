"""Private text files as tokens. Uses no framework.

Tokens are bytes (and 256, the end of a text), or those of `tokenizer.json` in the folder. That must
be a byte-pair encoding of public text, because its entries are words of that text. The run names it
by its SHA-256, because all peers need the same one.

The tokens of all files, in the order of their paths, go to a memory-mapped file, so a folder may be
larger than memory.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from agent.data.settings import DataSettings
from protocols.errors import DataError, SchemaMismatch
from protocols.extras import needs_extra
from protocols.local.atomic_files import replacing

BYTES = "bytes"
BYTE_VOCABULARY = 257
END_OF_TEXT = 256
TOKENIZER = "tokenizer.json"
SUFFIXES = (".md", ".text", ".txt")

_PIECE_BYTES = 1 << 20
#: Longer text is not a path.
_MAX_PATH_CHARS = 1024
_KEPT = "text-{key}.tokens"

Tokens = npt.NDArray[np.int32]
Encode = Callable[[str], Sequence[int]]


class Tokenizer(NamedTuple):
    """Converts text to tokens and back. `vocabulary` is the number of tokens, `digest` that of the
    tokenizer's file."""

    encode: Encode
    decode: Callable[[Sequence[int]], str]
    vocabulary: int
    end: int
    digest: str


def load_tokenizer(kind: str, folder: Path) -> Tokenizer:
    """The tokenizer of a run: `kind` is BYTES, or the SHA-256 of the folder's `tokenizer.json`.

    Raises DataError, SchemaMismatch, MissingPackage.
    """
    if kind == BYTES:
        return Tokenizer(
            lambda text: text.encode(), _text_of_bytes, BYTE_VOCABULARY, END_OF_TEXT, ""
        )
    path = (folder if folder.is_dir() else folder.parent) / TOKENIZER
    try:
        data = path.read_bytes()
    except OSError as err:
        raise DataError(f"there is no {TOKENIZER} beside the text", f"not at {path}") from err
    digest = hashlib.sha256(data).hexdigest()
    if digest != kind:
        hint = f"commonweight run start … --set tokens={digest}, or the others' file at {path}"
        raise SchemaMismatch("tokens", kind[:12], digest[:12], hint)
    with needs_extra("lora", "a tokenizer of byte pairs"):
        from tokenizers import Tokenizer as Made
    try:
        made: Any = Made.from_str(data.decode())
    except Exception as err:  # the library can raise any error for a damaged file
        raise DataError(f"{TOKENIZER} cannot be read", f"{path}: {err}") from err
    size = made.get_vocab_size()
    # One more than its entries, as none of them certainly means the end of a text.
    return Tokenizer(lambda text: made.encode(text).ids, made.decode, size + 1, size, digest)


def _text_of_bytes(tokens: Sequence[int]) -> str:
    return bytes(t for t in tokens if t < END_OF_TEXT).decode(errors="replace")


def text_files(path: str) -> list[Path]:
    """The text files at `path`: itself, or all in the folder, sorted. Raises DataError."""
    root = Path(path)
    if path and root.is_file():
        return [root]
    if not path or not root.is_dir():
        raise DataError(
            "there is no folder of text",
            f"not at {path!r}: commonweight-agent policy set data FOLDER",
        )
    found = sorted(
        p
        for p in root.rglob("*")
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
    )
    if not found:
        raise DataError("there is no text", f"nothing in {root} ends in {', '.join(SUFFIXES)}")
    return found


def read_pieces(path: Path) -> Iterator[str]:
    """The text of a file in pieces of about a megabyte. Raises DataError if it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with path.open("rb") as file:
        while True:
            data = file.read(_PIECE_BYTES)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as err:
                raise DataError(
                    "a text is not UTF-8",
                    f"{path}, at byte {done + err.start} or so: iconv -t utf-8 converts it",
                ) from err
            if text:
                yield text
            if not data:
                return
            done += len(data)


def read_texts(source: str) -> Iterator[tuple[str, str]]:
    """Names and texts of `source`: a file, all files of a folder, or a text, named ""."""
    is_path = len(source) < _MAX_PATH_CHARS and Path(source).exists()
    for path in text_files(source) if is_path else []:
        yield path.name, "".join(read_pieces(path))
    if not is_path:
        yield "", source


def tokenize(data: DataSettings, made: Tokenizer) -> Tokens:
    """The tokens of all files, int32[n], mapped. Raises DataError."""
    paths = text_files(data.path)
    if not data.cache:
        return np.fromiter((t for part in _encoded(paths, made) for t in part), np.int32)
    stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    key = hashlib.sha256(json.dumps([made.digest, stamps]).encode()).hexdigest()[:32]
    kept = Path(data.cache) / _KEPT.format(key=key)
    for other in kept.parent.glob(_KEPT.format(key="*")):
        if other != kept:
            other.unlink(missing_ok=True)
    if not kept.exists():
        with replacing(kept) as file:
            for part in _encoded(paths, made):
                file.write(part.astype("<i4").data)
    if not kept.stat().st_size:
        return np.zeros(0, np.int32)
    return np.memmap(kept, np.dtype("<i4"), "r")


def _encoded(paths: Sequence[Path], made: Tokenizer) -> Iterator[Tokens]:
    for path in paths:
        for text in read_pieces(path):
            yield np.fromiter(made.encode(text), np.int32)
        yield np.array([made.end], np.int32)
