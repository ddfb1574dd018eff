"""One thread per process: tiny models run several times slower on more, and results do not depend on the machine."""

from __future__ import annotations

import hypothesis
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("suite")
