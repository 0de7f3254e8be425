"""Text to tokens and back: bytes for the models that ship with shedder, Hugging Face tokenizers for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
                   "generation_config.json", "chat_template.jinja")


class Tokenizer(Protocol):
    """What the library needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


class ByteTokenizer:
    """One token per byte of UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def load_tokenizer(folder: str | Path | None, name: str | None) -> Tokenizer:
    """The tokenizer of a checkpoint folder: `name` is "bytes", or None for the tokenizer files in the folder.

    Raises:
        ValueError: neither is there, or the files need transformers and it is not installed.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name is not None:
        raise ValueError(f"tokenizer is {name!r}; accepted: 'bytes', or null with tokenizer files in the folder")
    if folder is None or not any((Path(folder) / file).exists() for file in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}); "
                         "copy the tokenizer of the model into the folder, or pass tokens instead of text")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(f"the tokenizer files in {folder} are read by transformers, which is not installed; "
                         "pip install transformers") from error
    return cast(Tokenizer, AutoTokenizer.from_pretrained(str(folder)))
