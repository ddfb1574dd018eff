"""Other methods on the same backbones, and VAR with one of its own, for comparison (docs/baselines.md)."""

from flashar_pl.models.baselines.block_diffusion import BlockDiffusion
from flashar_pl.models.baselines.par import PAR
from flashar_pl.models.baselines.var import VAR
