"""What became of everything an input holds, for every form of input: found = used + left out, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

HIDDEN = ("@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "#recycle", "System Volume Information")
"""Names that operating systems and storage boxes add, besides those that begin with a dot."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is nobody's data: .git, ._a.jpg, .ipynb_checkpoints, @eaDir, ..."""
    return (name.startswith(".") and name not in (".", "..")) or name in HIDDEN


@dataclass
class Account:
    """Entries (files, folders that hold none, records, items of a list) of one input."""

    used: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Reason -> entries."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> the first of them."""

    @property
    def found(self) -> int:
        return self.used + sum(self.left_out.values())

    def leave_out(self, reason: str, example: str, number: int = 1) -> None:
        """Count entries that are no samples."""
        if number:
            self.left_out[reason] = self.left_out.get(reason, 0) + number
            self.examples.setdefault(reason, example)

    @property
    def facts(self) -> dict[str, Any]:
        """The numbers, for a manifest."""
        return {"found": self.found, "used": self.used, "left_out": dict(self.left_out)}

    def __str__(self) -> str:
        """In one line, such as: found 30 entries, used 27, left out 3: 3 hidden (such as .git)."""
        such = {why: f" (such as {example})" for why, example in self.examples.items()}
        reasons = ", ".join(f"{n:,} {why}{such.get(why, '')}" for why, n in self.left_out.items())
        number = sum(self.left_out.values())
        return f"found {self.found:,} entries, used {self.used:,}, left out {number:,}" + (reasons and f": {reasons}")
