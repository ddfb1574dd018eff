"""Emu3.5's text tokenizer: byte-pair encoding from the released rank file, the prompt template, the image prefix.

Shapes: n tokens of a prompt, template included. Ids are those of the whole vocabulary: text, then special tokens,
then visual tokens. No code that comes with the weights is run.
"""

from __future__ import annotations

import base64
import binascii
import unicodedata
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flashar_pl.console import needing
from flashar_pl.tokenizers.files import require_file
from flashar_pl.tokenizers.prompts import MAX_PROMPT, PromptTokenizer, cut_off, too_many

PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is cut before byte pairs are merged (Qwen's pattern): no merge crosses a cut."""

SPECIAL = {
    "BOS": "<|extra_203|>",
    "BSS": "<|extra_100|>",
    "IMG": "<|image token|>",
    "BOI": "<|image start|>",
}
"""Short names of the special tokens around a prompt."""
NAMES = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{i}|>" for i in range(205)),
    *("<|image token|>", "<|image start|>", "<|image end|>"),
)
"""All special tokens in the order of their ids, which follow those of the rank file; then come the visual codes."""

HEAD, TAIL = "You are a helpful assistant for t2i task. USER:", " ASSISTANT: "
"""The template is BOS, HEAD, a space, the text, TAIL, BSS. Both are cut off from any text by PIECES."""

UNCONDITIONAL = {
    "official": "You are a helpful assistant. USER:  ASSISTANT: ",
    "released": HEAD + " " + TAIL,
}
"""What stands between BOS and BSS in the unconditional prompt: of Emu3.5, and of the released FlashAR checkpoints."""

RANK_FILE = "emu3.tiktoken"
MOST = 32 << 20
"""Bytes of a rank file at most; published ones have a tenth of it."""
ADVICE = "Give the path of emu3.tiktoken, which comes with BAAI/Emu3.5-Image; nothing is downloaded for you."


class Emu35Text(PromptTokenizer):
    """Prompts to token ids. A `<|...|>` inside a user's text is plain text."""

    def __init__(self, ranks: str | Path) -> None:
        """ranks: emu3.tiktoken. Raises ValueError where it is missing or damaged, or tiktoken is not installed."""
        with needing("the tokenizer of prompts", "emu"):
            import tiktoken
        table = read_ranks(ranks, ADVICE)
        ids = {name: len(table) + i for i, name in enumerate(NAMES)}
        self._bpe: Any = tiktoken.Encoding("emu35", pat_str=PIECES, mergeable_ranks=table, special_tokens=ids)
        self.special = {short: ids[name] for short, name in SPECIAL.items()}
        self.visual_token_offset = len(table) + len(NAMES)

    @classmethod
    def from_directory(cls, directory: str | Path) -> Emu35Text:
        """That of a directory with emu3.tiktoken; read again only where the file has changed."""
        file = Path(directory).expanduser() / RANK_FILE
        return _from_file(file, file.stat().st_mtime_ns if file.is_file() else 0)

    def check_vocabulary(self, size: int, visual_token_offset: int | None) -> None:
        if visual_token_offset != self.visual_token_offset:
            raise ValueError(
                f"the prompt assets place visual codes from token id {self.visual_token_offset} on, the model from "
                f"{visual_token_offset}; expected the {RANK_FILE} that came with the model's weights."
            )

    def encode(self, text: str) -> list[int]:
        """Ids of a text after NFC normalisation."""
        return self._bpe.encode_ordinary(unicodedata.normalize("NFC", text))

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of a prompt's ids, special tokens by name; bytes that are no UTF-8 become U+FFFD."""
        return self._bpe.decode([int(token) for token in ids])

    def prompt(
        self, text: str, *, max_length: int = MAX_PROMPT, too_long: Literal["error", "truncate"] = "error"
    ) -> Tensor:
        ids = self._wrap(self.encode(f"{HEAD} {text}{TAIL}"))
        if len(ids) <= max_length:
            return torch.tensor(ids)
        if too_long == "error":
            raise too_many(len(ids), max_length, text)
        return torch.tensor(self._truncate(ids, max_length))

    def unconditional(self, style: Literal["official", "released"] = "official") -> Tensor:
        """(n,) int64 ids of the prompt without a text, see UNCONDITIONAL."""
        return torch.tensor(self._wrap(self.encode(UNCONDITIONAL[style])))

    def image_prefix(self, height: int, width: int) -> Tensor:
        """int64 ids that open an image of height x width codes: BOI, the digits of "H*W", IMG."""
        assert min(height, width) > 0
        return torch.tensor([self.special["BOI"], *self.encode(f"{height}*{width}"), self.special["IMG"]])

    def _wrap(self, ids: list[int]) -> list[int]:
        return [self.special["BOS"], *ids, self.special["BSS"]]

    def _truncate(self, ids: list[int], max_length: int) -> list[int]:
        head = 1 + len(self.encode(HEAD))
        tail = [*self.encode(TAIL), self.special["BSS"]]
        assert ids[-len(tail) :] == tail, "a text merged with the end of the template"
        room = max_length - head - len(tail)
        if room < 1:
            raise ValueError(
                f"max_length is {max_length}, but the template alone takes {head + len(tail)} tokens; "
                f"expected at least {head + len(tail) + 1}."
            )
        body = ids[head : -len(tail)]
        kept = body[:room]
        while self.decode(kept).endswith("\ufffd"):  # cut inside a character
            kept.pop()
        lost = self.decode(body[len(kept) :])
        warnings.warn(cut_off(len(ids), max_length, len(body) - len(kept), lost), stacklevel=3)
        return [*ids[:head], *kept, *tail]


@lru_cache(maxsize=2)
def _from_file(ranks: Path, changed: int) -> Emu35Text:
    """A server asks for it at every prompt."""
    return Emu35Text(ranks)


def read_ranks(ranks: str | Path, advice: str) -> dict[bytes, int]:
    """Byte sequence -> rank. The file has one base64 word and its rank on each line; ranks are 0 .. n - 1.

    Raises ValueError, with advice on where to get it, where it is missing, too large or of another form.
    """
    path, table = require_file(ranks, "rank file", advice), dict[bytes, int]()
    if (size := path.stat().st_size) > MOST:
        raise ValueError(f"{path} has {size:,} bytes; expected a rank file of at most {MOST:,}. {advice}")
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            word, rank = line.split()
            table[base64.b64decode(word, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{path}, line {number}: {line[:40]!r} is not a base64 word and its rank. "
                f"A git-lfs pointer instead of the file? {advice}"
            ) from error
    if sorted(table.values()) != list(range(len(table))) or any(bytes([i]) not in table for i in range(256)):
        raise ValueError(
            f"{path} holds {len(table)} words whose ranks are not 0 .. {len(table) - 1}, or lacks single bytes; "
            f"is it complete? {advice}"
        )
    return table
