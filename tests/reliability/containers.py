"""Damage inside of files whose own checksums and lengths hold: what a reader meets that trusts them.

Most damaged archives and pictures are refused for a checksum; these reach what lies behind it.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable

Read = Callable[[bytes], object]


def inside_zip(archive: bytes, member: str, read: Read) -> tuple[Read, list[bytes]]:
    """A reader of other contents of the entry whose name ends with `member`, and the good one."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    [name] = [name for name in entries if name.endswith(member)]

    def call(content: bytes) -> object:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for other, kept in entries.items():
                file.writestr(other, content if other == name else kept)
        return read(buffer.getvalue())

    return call, [entries[name]]


def inside_safetensors(file: bytes, read: Read) -> tuple[Read, list[bytes]]:
    """A reader of other headers, and the good one."""
    end = 8 + int.from_bytes(file[:8], "little")
    return lambda header: read(len(header).to_bytes(8, "little") + header + file[end:]), [file[8:end]]


def summed_tar(data: bytes) -> bytes:
    """A tar whose blocks that could be headers have the checksum of their bytes."""
    fixed = bytearray(data)
    for at in range(0, len(fixed) - 511, 512):
        if fixed[at + 257 : at + 262] == b"ustar":
            fixed[at + 148 : at + 156] = b" " * 8
            fixed[at + 148 : at + 156] = b"%06o\0 " % sum(fixed[at : at + 512])
    return bytes(fixed)


def summed_png(data: bytes) -> bytes:
    """A PNG whose chunks have the CRC-32 of their bytes, as far as their lengths lead."""
    fixed, at = bytearray(data), 8
    while at + 12 <= len(fixed):
        end = at + 8 + int.from_bytes(fixed[at : at + 4], "big")
        if end + 4 > len(fixed):
            break
        fixed[end : end + 4] = zlib.crc32(fixed[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(fixed)
