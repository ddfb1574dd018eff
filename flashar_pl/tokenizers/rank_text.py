"""MammothModa2's text tokenizer: byte pairs from its rank file, and special tokens after them in a fixed order.

It has the methods of a transformers tokenizer that `HubText` uses. No code that comes with the weights is run.
"""

from __future__ import annotations

import re
from functools import cached_property, lru_cache
from pathlib import Path

from flashar_pl.console import needing
from flashar_pl.tokenizers.text import PIECES, read_ranks

RANKS, VISION_TOKENS = "mammothu.tiktoken", "mammothu_vision_tokens.txt"
ADVICE = f"Give the {RANKS} and {VISION_TOKENS} that came with the model's weights; nothing is downloaded for you."
QWEN = (
    *("object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end", "vision_start"),
    *("vision_end", "vision_pad", "image_pad", "video_pad"),
)
TOOLS = ("<tool_call>", "</tool_call>")
FILLS = ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
LAST = ("endofline", "endoffile", "gen_placeholder", "useless token", "beginoftext")
"""The first tokens of images: the row end, then four that no image has."""


def _marked(*names: str) -> tuple[str, ...]:
    return tuple(f"<|{name}|>" for name in names)


NAMES = (
    *_marked("endoftext", "im_start", "im_end", *QWEN),
    *TOOLS,
    *_marked(*FILLS, *(f"extra_{i}" for i in range(181)), *(f"extra_margin_{i}" for i in range(218)), *LAST),
)
"""Special tokens in the order of their ids, which follow the ranks; then come those of `VISION_TOKENS`."""
MOST = 1 << 20
"""Bytes of `VISION_TOKENS` at most; 16,387 such names have 0.4 of it."""


class RankText:
    """Text to ids and special tokens by name."""

    def __init__(self, directory: str | Path) -> None:
        """Raises ValueError where a file is missing, damaged or not of this form, or tiktoken is not installed."""
        with needing("the tokenizer of prompts", "emu"):
            import tiktoken
        ranks, self.special = read_files(directory)
        self._bpe = tiktoken.Encoding("mammothu", pat_str=PIECES, mergeable_ranks=ranks, special_tokens=self.special)
        self.vocab_size = self._bpe.n_vocab

    @cached_property
    def all_special_tokens(self) -> list[str]:
        """Names of all special tokens."""
        return list(self.special)

    @property
    def first_code(self) -> int | None:
        """Id of the token of code 0."""
        return next((self.special[name] for name in self.special if re.fullmatch(r"<\|visual token 0+\|>", name)), None)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """Of a special token; None where there is none of that name."""
        return self.special.get(token)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text, special tokens by name; none is added."""
        return self._bpe.encode(text, allowed_special="all")


def read_files(directory: str | Path) -> tuple[dict[bytes, int], dict[str, int]]:
    """Ids of byte sequences, and of special tokens by name; read again only where a file has changed.

    Raises ValueError where one is missing, damaged or not of this form.
    """
    files = [Path(directory).expanduser() / name for name in (RANKS, VISION_TOKENS)]
    return _read(files[0].parent, tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in files))


@lru_cache(maxsize=2)
def _read(folder: Path, changed: tuple[int, ...]) -> tuple[dict[bytes, int], dict[str, int]]:
    ranks = read_ranks(folder / RANKS, ADVICE)
    return ranks, {name: len(ranks) + i for i, name in enumerate((*NAMES, *_vision_tokens(folder)))}


def _vision_tokens(folder: Path) -> list[str]:
    """Names in `VISION_TOKENS`, one a line."""
    file = folder / VISION_TOKENS
    if not file.is_file() or file.stat().st_size > MOST:
        found = f"has {file.stat().st_size:,} bytes; expected {MOST:,} at most" if file.is_file() else "is missing"
        raise ValueError(f"{file} {found}. {ADVICE}")
    names = [line.strip() for line in file.read_bytes().decode(errors="replace").splitlines() if line.strip()]
    if strange := [name for name in names if not re.fullmatch(r"<\|[\w ]{1,60}\|>", name) or name in NAMES]:
        raise ValueError(f"{file} holds {strange[0][:60]!r}; expected a new name such as <|image start|>. {ADVICE}")
    if len({*names}) < len(names) or not names:
        raise ValueError(
            f"{file} holds {len(names)} names, {len({*names})} different ones; expected each once. {ADVICE}"
        )
    return names
