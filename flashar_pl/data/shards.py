"""The public door to code shards: manifest, writer, reader, check."""

from flashar_pl.data.manifest import ConditionSpec, Manifest
from flashar_pl.data.reader import ShardReader
from flashar_pl.data.verify import verify
from flashar_pl.data.writer import ShardWriter

__all__ = ["ConditionSpec", "Manifest", "ShardReader", "ShardWriter", "verify"]
