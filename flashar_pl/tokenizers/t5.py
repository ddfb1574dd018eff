"""Captions as features of a T5 encoder, what text-conditional LlamaGen models take.

Shapes: B captions, T positions, C feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flashar_pl.pretrained import pretrained

EXAMPLE, WHAT = "google/flan-t5-xl", "T5 encoder of captions"
POSITIONS = 120
"""Positions of a caption; longer ones are cut, shorter ones padded."""


def encode_captions(
    directory: str | Path,
    captions: Sequence[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
) -> tuple[Tensor, Tensor]:
    """Last hidden states (B, T, C) float32 and mask (B, T) bool of captions, on the CPU; left padding is zero.

    directory: a T5 encoder and its tokenizer as published (LlamaGen: google/flan-t5-xl, C = 2048). Captions are
    stripped and lower-cased, as LlamaGen does; its removal of web addresses and mark-up is left out.

    Raises:
        ValueError: transformers is not installed, or `directory` holds no T5.
    """
    tokenizer = pretrained("AutoTokenizer", directory, EXAMPLE, WHAT, padding_side="left")
    encoder = pretrained("T5EncoderModel", directory, EXAMPLE, WHAT, dtype=dtype)
    encoder.to(torch.device(device)).eval()  # type: ignore[arg-type]
    parts, masks = [], []
    for start in range(0, len(captions), batch_size):
        texts = [caption.strip().lower() for caption in captions[start : start + batch_size]]
        ids = tokenizer(texts, max_length=POSITIONS, padding="max_length", truncation=True, return_tensors="pt")
        mask = ids["attention_mask"]
        with torch.no_grad():
            states = encoder(input_ids=ids["input_ids"].to(device), attention_mask=mask.to(device)).last_hidden_state
        masks.append(mask.bool())
        parts.append(states.float().cpu() * mask[..., None])
    return torch.cat(parts), torch.cat(masks)
