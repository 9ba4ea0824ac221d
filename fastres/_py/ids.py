"""Task ids as numbers, which take half the memory of the text."""

from __future__ import annotations

from fastres.ids import is_uuid

__all__ = ("compact", "expand")


def compact(id_: str) -> int | str:
    """See :class:`fastres._protocols.Compact`."""
    return int(id_.replace("-", ""), 16) if is_uuid(id_) else id_


def expand(key: int | str) -> str:
    """See :class:`fastres._protocols.Expand`."""
    if isinstance(key, str):
        return key
    digits = f"{key:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
