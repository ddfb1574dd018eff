"""Models over a code grid: the raster baseline and FlashAR."""

from flashar_pl.models.base import GridModel, Logits
from flashar_pl.models.flashar import FlashAR
from flashar_pl.models.raster import RasterAR
