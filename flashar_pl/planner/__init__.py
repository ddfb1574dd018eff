"""Arithmetic of memory and time: what a model, a decoding job or a training run needs, before anything is allocated."""

from flashar_pl.planner.decode import DecodeJob, DecodeMemory, decode_job, decode_memory, largest_batch, model_bytes
from flashar_pl.planner.sizes import ModelSizes, model_sizes

__all__ = [
    "DecodeJob",
    "DecodeMemory",
    "ModelSizes",
    "decode_job",
    "decode_memory",
    "largest_batch",
    "model_bytes",
    "model_sizes",
]
