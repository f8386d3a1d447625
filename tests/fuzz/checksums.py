"""Checksums of OCDBT's files made right again, so that mutations get past them."""

from __future__ import annotations

#: How a manifest and a node of a tree begin.
MAGIC = (b"\x0c\xdb\x3a\x2a", b"\x0c\xdb\x20\xde")
_POLYNOMIAL = 0x82F63B78
_HEADER_BYTES, _SUM_BYTES = 12, 4


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """The checksum of Castagnoli."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def mended(name: str, data: bytes) -> bytes:
    """A file with the right checksum behind each manifest or node in it.

    A manifest gets its right length too: it takes the whole file.
    """
    content = bytearray(data)
    if content.startswith(MAGIC[0]):
        content[4:_HEADER_BYTES] = len(content).to_bytes(8, "little")
    for magic in MAGIC:
        at = content.find(magic)
        while at >= 0:
            size = int.from_bytes(content[at + 4 : at + _HEADER_BYTES], "little")
            if _HEADER_BYTES + _SUM_BYTES <= size <= len(content) - at:
                end = at + size - _SUM_BYTES
                right = crc32c(bytes(content[at:end]))
                content[end : at + size] = right.to_bytes(_SUM_BYTES, "little")
            at = content.find(magic, at + 1)
    return bytes(content)
