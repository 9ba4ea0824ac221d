"""Decompresses bodies up to a size limit."""

from __future__ import annotations

import bz2
import lzma
import zlib
from functools import partial
from typing import Any

from kombu.compression import decompress
from kombu.exceptions import DecodeError

from fastres.errors import OversizedResult

__all__ = ("unpack",)

#: Bytes that unpacking LZMA may take: a header of 13 bytes can ask for 4 GB. The highest preset takes 65 MB.
LZMA_MEMORY = 1 << 28
#: Decompressors of the standard library stop at a limit; the others are checked when they are done.
STOPPING: dict[str, Any] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": partial(lzma.LZMADecompressor, memlimit=LZMA_MEMORY),
}


def unpack(data: Any, compression: str, most: int) -> Any:
    """A body as it was before kombu compressed it.

    Args:
        compression: the content type of the method, as kombu names it.
        most: bytes that it may have.

    Raises:
        kombu.exceptions.DecodeError: it cannot be unpacked.
        fastres.errors.OversizedResult: it has more.
    """
    data = data.encode() if isinstance(data, str) else data
    try:
        if compression in STOPPING:
            stopping = STOPPING[compression]()
            unpacked = stopping.decompress(data, most + 1)
            if len(unpacked) <= most and not stopping.eof:
                raise DecodeError(f"a truncated {compression} body")
        else:
            unpacked = decompress(data, compression)
    except DecodeError:
        raise
    except Exception as exc:
        raise DecodeError(f"cannot unpack a {compression} body: {exc!r}") from exc
    if len(unpacked) > most:
        raise OversizedResult(f"a {compression} body of more than {most} bytes")
    return unpacked
