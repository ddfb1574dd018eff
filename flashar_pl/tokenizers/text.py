"""Emu3.5's text tokenizer: byte-pair encoding from the released rank file, the prompt template, the image prefix.

Shapes: n tokens of a prompt, template included. Ids are those of the whole vocabulary: text, then special tokens,
then visual tokens. No code that comes with the weights is run.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flashar_pl.tokenizers.files import require_file

PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is cut before byte pairs are merged (Qwen's pattern): no merge crosses a cut."""

SPECIAL = re.compile(r"<\|[^<|]*\|>")
"""The form of every special token."""

NAMES = {
    "PAD": "<|endoftext|>",
    "BOS": "<|extra_203|>",
    "EOS": "<|extra_204|>",
    "BSS": "<|extra_100|>",
    "ESS": "<|extra_101|>",
    "BOG": "<|extra_60|>",
    "EOG": "<|extra_61|>",
    "BOC": "<|extra_50|>",
    "EOC": "<|extra_51|>",
    "EOL": "<|extra_200|>",
    "EOF": "<|extra_201|>",
    "TMS": "<|extra_202|>",
    "IMG": "<|image token|>",
    "BOI": "<|image start|>",
    "EOI": "<|image end|>",
}
"""Short names of the special tokens with a meaning."""

FIRST_VISUAL = "<|visual token 000000|>"
HEAD, TAIL = "You are a helpful assistant for t2i task. USER:", " ASSISTANT: "
"""The template is BOS, HEAD, a space, the text, TAIL, BSS. Both are cut off from any text by PIECES."""

UNCONDITIONAL = {
    "official": "You are a helpful assistant. USER:  ASSISTANT: ",
    "released": HEAD + " " + TAIL,
}
"""What stands between BOS and BSS in the unconditional prompt: of Emu3.5, and of the released FlashAR checkpoints."""

MAX_PROMPT = 4096
"""Default limit of a prompt's tokens; the rest of the model's 32,768 positions is for the image."""

RANK_FILE, SPECIAL_FILE = "emu3.tiktoken", "emu3_vision_tokens.txt"
"""Names of the released assets; the second may be absent."""
ADVICE = "Give the path of emu3.tiktoken, which comes with BAAI/Emu3.5-Image; nothing is downloaded for you."


def published_special_tokens() -> list[str]:
    """The lines of the released emu3_vision_tokens.txt."""
    visual = (f"<|visual token {code:06d}|>" for code in range(131072))
    return [NAMES["IMG"], NAMES["BOI"], NAMES["EOI"], *visual]


class Emu35Text:
    """Prompts to token ids. A `<|...|>` inside a user's text is plain text unless `parse_special` is set."""

    def __init__(self, ranks: str | Path, special_tokens: str | Path | None = None) -> None:
        """ranks: emu3.tiktoken. special_tokens: emu3_vision_tokens.txt; None takes the published list.

        Raises ValueError where a file is missing or damaged, and where tiktoken is not installed.
        """
        try:
            import tiktoken
        except ImportError as error:
            raise ValueError("Emu3.5 prompts need tiktoken: pip install 'flashar-pl[emu]'") from error
        table = _read_ranks(require_file(ranks, "rank file", ADVICE))
        self._bpe: Any = tiktoken.Encoding("emu35", pat_str=PIECES, mergeable_ranks=table, special_tokens={})
        text = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
        listed = published_special_tokens() if special_tokens is None else _read_special(special_tokens)
        self._special = {name: len(table) + i for i, name in enumerate([*text, *listed])}
        self._names = {token: name for name, token in self._special.items()}
        if absent := [name for name in (*NAMES.values(), FIRST_VISUAL) if name not in self._special]:
            raise ValueError(
                f"{special_tokens} lacks the special tokens {', '.join(absent)}: is it the published file?"
            )
        self.special: dict[str, int] = {short: self._special[name] for short, name in NAMES.items()}
        self.vocabulary = len(table) + len(self._special)
        self.visual_token_offset = self._special[FIRST_VISUAL]

    @classmethod
    def from_directory(cls, directory: str | Path) -> Emu35Text:
        """The tokenizer of a directory with the released files; emu3_vision_tokens.txt may be absent."""
        folder = Path(directory).expanduser()
        listed = folder / SPECIAL_FILE
        files = [folder / RANK_FILE, *([listed] if listed.is_file() else [])]
        return _from_files(*((file, file.stat().st_mtime_ns if file.is_file() else 0) for file in files))

    def check_vocabulary(self, visual_token_offset: int | None) -> None:
        """ValueError unless a model whose visual codes begin at this token id was trained with this tokenizer."""
        if visual_token_offset != self.visual_token_offset:
            raise ValueError(
                f"the prompt assets place visual codes from token id {self.visual_token_offset} on, the model from "
                f"{visual_token_offset}; expected the {RANK_FILE} that came with the model's weights."
            )

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of a text after NFC normalisation. parse_special: `<|name|>` becomes the token of that name."""
        text = unicodedata.normalize("NFC", text)
        if not parse_special:
            return self._bpe.encode_ordinary(text)
        ids: list[int] = []
        start = 0
        for match in SPECIAL.finditer(text):
            if match[0] in self._special:
                ids += [*self._bpe.encode_ordinary(text[start : match.start()]), self._special[match[0]]]
                start = match.end()
        return ids + self._bpe.encode_ordinary(text[start:])

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of some ids, special tokens by name; bytes that are no UTF-8 become U+FFFD."""
        plain = b"".join(self._bytes(int(token)) for token in ids)
        return plain.decode("utf-8", errors="replace")

    def prompt(
        self,
        text: str,
        *,
        parse_special: bool = False,
        max_length: int = MAX_PROMPT,
        too_long: Literal["error", "truncate"] = "error",
    ) -> Tensor:
        """(n,) int64 ids of the text-to-image template around `text`, n <= max_length.

        A longer prompt raises ValueError; with too_long="truncate" the end of the text is cut (never inside a
        character), the template stays whole, and a UserWarning says what was left out.
        """
        if too_long not in ("error", "truncate"):
            raise ValueError(f"too_long is {too_long!r}; expected 'error' or 'truncate'.")
        ids = self._wrap(self.encode(f"{HEAD} {text}{TAIL}", parse_special))
        if len(ids) <= max_length:
            return torch.tensor(ids)
        if too_long == "error":
            raise ValueError(
                f"the prompt takes {len(ids)} tokens with its template, {len(ids) - max_length} more than the limit of "
                f"{max_length}: '{_short(text)}'. Shorten it, raise max_length, or pass too_long='truncate'."
            )
        return torch.tensor(self._truncate(ids, max_length))

    def unconditional(self, style: Literal["official", "released"] = "official") -> Tensor:
        """(n,) int64 ids of the prompt without a text: Emu3.5's own, or the released FlashAR checkpoints' (the
        text-to-image template around an empty text)."""
        if style not in UNCONDITIONAL:
            raise ValueError(f"unconditional style is {style!r}; expected one of {', '.join(UNCONDITIONAL)}.")
        return torch.tensor(self._wrap(self.encode(UNCONDITIONAL[style])))

    def image_prefix(self, height: int, width: int) -> Tensor:
        """int64 ids that open an image of height x width codes: BOI, the digits of "H*W", IMG."""
        if height < 1 or width < 1:
            raise ValueError(f"the grid is {height} x {width} codes; expected positive sizes.")
        return torch.tensor([self.special["BOI"], *self.encode(f"{height}*{width}"), self.special["IMG"]])

    def conditions(self, prompts: Sequence[str], grid: tuple[int, int], **options: Any) -> list[Tensor]:
        """The whole prefix of each prompt, what the Emu3.5 backbone takes as condition: `prompt` then `image_prefix`.

        options: those of `prompt`.
        """
        opening = self.image_prefix(*grid)
        return [torch.cat([self.prompt(text, **options), opening]) for text in prompts]

    def _wrap(self, ids: list[int]) -> list[int]:
        return [self.special["BOS"], *ids, self.special["BSS"]]

    def _bytes(self, token: int) -> bytes:
        name = self._names.get(token)
        return self._bpe.decode_single_token_bytes(token) if name is None else name.encode()

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
        warnings.warn(
            f"the prompt takes {len(ids)} tokens, the limit is {max_length}: the last {len(body) - len(kept)} tokens "
            f"of its text were left out: '{_short(lost)}'.",
            stacklevel=3,
        )
        return [*ids[:head], *kept, *tail]


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


@lru_cache(maxsize=2)
def _from_files(ranks: tuple[Path, int], special: tuple[Path, int] | None = None) -> Emu35Text:
    """The tokenizer of files given with their times of change: a server asks for it at every prompt."""
    return Emu35Text(ranks[0], None if special is None else special[0])


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Byte sequence -> rank. The file has one base64 word and its rank on each line; ranks are 0 .. n - 1."""
    table: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            word, rank = line.split()
            table[base64.b64decode(word, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{path}, line {number}: {line[:40]!r} is not a base64 word and its rank. "
                f"A git-lfs pointer instead of the file? {ADVICE}"
            ) from error
    if sorted(table.values()) != list(range(len(table))) or any(bytes([i]) not in table for i in range(256)):
        raise ValueError(
            f"{path} holds {len(table)} words whose ranks are not 0 .. {len(table) - 1}, or lacks single bytes; "
            f"is it complete? {ADVICE}"
        )
    return table


def _read_special(path: str | Path) -> list[str]:
    file = require_file(path, "special tokens file", "Give the path of emu3_vision_tokens.txt, or leave it out.")
    names = file.read_text(encoding="utf-8").splitlines()
    if odd := [name for name in names if not SPECIAL.fullmatch(name)]:
        raise ValueError(f"{file} has lines that are no special token: '{_short(odd[0])}'; expected '<|...|>'.")
    if len(set(names)) != len(names):
        raise ValueError(f"{file} lists a special token twice.")
    return names
