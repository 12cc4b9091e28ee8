"""An entry of the input cache: a model input and the facts about it in, the bytes of one file out, and back.

The tensor is compressed with Blosc (numcodecs, lz4 with byte shuffle). For model inputs of real CT, the files
are as small as Parquet with lz4 makes them, in 0.4 times the time, and are read in 0.3 times the time.

Layout: `_MAGIC`, the CRC-32 of all that follows, the length of the facts, the facts as JSON, and the
compressed voxels (float32, little-endian, C order).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import deflate
import numpy as np
from numpy.typing import NDArray

_MAGIC = b"featray input 1\n"
_HEAD = struct.Struct("<II")
"""CRC-32 of all that follows it, and the length of the facts."""
_VOXEL = np.dtype("<f4")
_CHUNK_VOXELS = 2**24
"""Voxels that are compressed at a time, because Blosc takes less than 2 GB."""


def pack(facts: Mapping[str, Any], tensor: NDArray[np.float32]) -> bytes:
    """Return the bytes of an entry.

    Args:
        facts: Anything that JSON can hold.
        tensor: The model input.
    """
    codec = _make_codec()
    voxels = np.ascontiguousarray(tensor, _VOXEL).reshape(-1)
    chunks = [
        codec.encode(voxels[first : first + _CHUNK_VOXELS]) for first in range(0, len(voxels), _CHUNK_VOXELS)
    ]
    described = {
        "facts": facts,
        "shape": tensor.shape,
        "chunks": [len(chunk) for chunk in chunks],
        "crc32": deflate.crc32(voxels.data),  # libdeflate's takes 0.3 ms for 8 MB
    }
    text = json.dumps(described).encode()
    head = _HEAD.pack(_compute_checksum(len(text), text, *chunks), len(text))
    return b"".join((_MAGIC, head, text, *chunks))


def unpack(data: bytes) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Return the facts and the tensor of an entry. The tensor may be changed.

    Raises:
        ValueError: The entry is damaged.
        MemoryError: There is no memory for the tensor.
    """
    start = len(_MAGIC) + _HEAD.size
    if len(data) < start or not data.startswith(_MAGIC):
        raise ValueError("it does not begin as an entry does")
    checksum, length = _HEAD.unpack_from(data, len(_MAGIC))
    body = memoryview(data)[start:]
    # Before anything is decompressed, because Blosc may not survive arbitrary bytes.
    if _compute_checksum(length, body) != checksum:
        raise ValueError("its checksum differs")
    described = json.loads(bytes(body[:length]))
    voxels = _decompress(body[length:], described["chunks"], described["shape"])
    if deflate.crc32(voxels.data) != described["crc32"]:
        raise ValueError("the checksum of its voxels differs")
    return described["facts"], voxels.astype(np.float32, copy=False).reshape(described["shape"])


def _decompress(data: memoryview, sizes: list[int], shape: list[int]) -> NDArray[np.float32]:
    """Return the voxels of all compressed chunks, flat."""
    codec, voxels = _make_codec(), np.empty(math.prod(shape), _VOXEL)
    for number, size in enumerate(sizes):
        first = number * _CHUNK_VOXELS
        try:
            codec.decode(data[:size], voxels[first : first + _CHUNK_VOXELS])
        except RuntimeError:  # another version of Blosc may have written it
            raise ValueError("its voxels cannot be decompressed") from None
        data = data[size:]
    return voxels


def _compute_checksum(length: int, *parts: bytes | memoryview) -> int:
    """Return the CRC-32 of the length of the facts, the facts and the compressed voxels.

    Args:
        length: Length of the facts.
        parts: Facts and voxels, which together make the rest of the entry.
    """
    checksum = deflate.crc32(struct.pack("<I", length))
    for part in parts:
        checksum = deflate.crc32(part, checksum)
    return int(checksum)


def _make_codec() -> Any:
    """Return the codec. It uses one thread, because other processes use the other cores."""
    from numcodecs import blosc  # only runs with a cache need it

    blosc.use_threads = False
    return blosc.Blosc(cname="lz4", clevel=5, shuffle=blosc.SHUFFLE)
