"""Prompts of unequal length, fed without their padding.

A batch of prompts is as long as its longest, often the empty one that guidance leads away from, and has that one once a
sample. Which rows there are depends on values, so this is for batches that no graph records.

Shapes: R rows, P prefix, n length of a prompt.
"""

from __future__ import annotations

import torch

from flashar_pl.backbones.condition import Prefix
from flashar_pl.decoding.loop import Inputs
from flashar_pl.grid import DecodePlan
from flashar_pl.layers.kv_cache import KVCache
from flashar_pl.models.base import GridModel, States


def prefill_by_length(model: GridModel, plan: DecodePlan, inputs: Inputs, cache: KVCache, vertical: bool) -> States:
    """As `GridModel.prefill`: states (R, 1, D) of the last token. Prompts of a length are one batch, equal ones a row.

    Keys and values stand right-aligned in the cache, as padded prompts have them; the padding is zeros.
    """
    prefix, length = inputs.prefix, len(inputs.prefix)
    counts, states = prefix.lengths.tolist(), {}
    cache.keys[..., :length, :] = cache.values[..., :length, :] = 0
    for n in sorted(set(counts)):
        of_length = [row for row, count in enumerate(counts) if count == n]
        x = prefix.x[of_length, length - n :]
        first = [next(i for i in range(len(x)) if torch.equal(x[i], each)) for each in x]  # the equal one before each
        own = sorted(set(first))
        rows = [of_length[i] for i in own]
        part = Prefix(x[own], prefix.lengths[rows])
        rope = inputs.rope[:, length - n : length]
        kept = KVCache(model.cache_spec(), len(own), n, cache.keys.dtype, x.device)
        turns = rope if len(rope) == 1 else rope[rows]
        found = model.prefill(part.x, turns, model.backbone.attention_mask(plan, part, 0), kept, vertical)
        for row, i in zip(of_length, map(own.index, first), strict=True):
            cache.keys[:, row, :, length - n : length] = kept.keys[:, i]
            cache.values[:, row, :, length - n : length] = kept.values[:, i]
            states[row] = (found[0][i], None if found[1] is None else found[1][i])
    cache.n_prefix = length
    cache.advance(length)
    h, v = zip(*(states[row] for row in range(len(counts))), strict=True)
    return torch.stack(h), torch.stack(v) if vertical else None
