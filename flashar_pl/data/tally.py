"""What became of the records that a device has streamed: counts in memory that its worker processes share."""

from __future__ import annotations

import torch
from torch.utils.data import get_worker_info

from flashar_pl.data.account import Account

LEFT_OUT = {
    "unreadable": "unreadable, or without an image or a condition",
    "hidden": "hidden",
    "torn": "damaged ends of tars",
}
"""What is counted, besides "records" -> why it was left out."""
COUNTED = ("records", *LEFT_OUT)


class Tally:
    """Counts of every reader, each of which adds to its own row."""

    def __init__(self, readers: int = 1) -> None:
        self._counts = torch.zeros(readers, len(COUNTED), dtype=torch.int64).share_memory_()

    def count(self, what: str) -> None:
        """One more of `COUNTED`, by this worker process."""
        worker = get_worker_info()
        self._counts[0 if worker is None else worker.id, COUNTED.index(what)] += 1

    def account(self) -> Account:
        """Of all readers so far; what they have read ahead is in it."""
        records, *left_out = self._counts.sum(0).tolist()
        return Account(records - left_out[0], {why: n for why, n in zip(LEFT_OUT.values(), left_out, strict=True) if n})
