"""Training: the module, what happens around its steps, and the names that a YAML gives as class_path.

Names are imported when they are asked for: most of this package needs Lightning, which takes seconds.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

PUBLIC = {
    "CompileBlocks": "compiled",
    "FlashARModule": "module",
    "ShardedStrategy": "sharded.strategy",
    "StopOnSignal": "preemption",
}
"""Name -> module below this package."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve_name(f"{__name__}.{PUBLIC[name]}:{name}")
