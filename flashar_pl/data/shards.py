"""The public door to code shards: manifest, writer, reader, check."""

from flashar_pl.data.manifest import ConditionSpec, Manifest, Record, Shard, check_matches, code_dtype
from flashar_pl.data.reader import Samples, ShardReader
from flashar_pl.data.verify import Verification, verify
from flashar_pl.data.writer import ShardWriter

__all__ = [
    "ConditionSpec",
    "Manifest",
    "Record",
    "Samples",
    "Shard",
    "ShardReader",
    "ShardWriter",
    "Verification",
    "check_matches",
    "code_dtype",
    "verify",
]
