"""Other methods on the same backbones, for comparison (docs/baselines.md)."""

from flashar_pl.models.baselines.par import PAR
