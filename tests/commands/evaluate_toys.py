"""What the tests of `flashar evaluate` share."""

import multiprocessing
import os
import socket
from pathlib import Path

import torch

from flashar_pl.checkpoints.weights import load_model
from flashar_pl.cli import main
from flashar_pl.decoding import generate
from flashar_pl.metrics.classifier import ClassifierFeatures
from flashar_pl.tokenizers import PixelTokenizer

FORK = multiprocessing.get_context("fork")  # torch is imported already; the test process runs one thread


def save_classifier(out: Path) -> str:
    """An untrained classifier of the digits' size: its features still tell images apart."""
    torch.manual_seed(3)
    return str(ClassifierFeatures((8, 8), 10, 32).save(out))


def evaluation(checkpoint: str, reference: str, features: str) -> list[object]:
    """Words of a command line without --out: 75 samples in batches of 16, the last one partial."""
    return [
        *("evaluate", "--checkpoint", checkpoint, "--reference", reference, "--features", features),
        *("--num-samples", 75, "--batch-size", 16),
    ]


def sample_images(checkpoint: str, n: int, seed: int, cfg_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 3, 8, 8) and codes (n, 8, 8) of samples 0 .. n - 1 with balanced labels, in one plain batch."""
    model = load_model(checkpoint).model
    codes = generate(model, torch.arange(n) % 10, (8, 8), cfg_scale=cfg_scale, seeds=seed)
    return PixelTokenizer(17).decode(codes), codes


def on_two_ranks(words: list[str]) -> list[int | None]:
    """Exit codes of a command on two forked processes, in the environment that torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def rank_main(rank: int) -> None:
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "one"}
        os.environ.update({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"})
        os._exit(main(words))

    processes = [FORK.Process(target=rank_main, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=100)
    return [process.exitcode for process in processes]
