"""Test that an entry of the input cache returns what was packed, to the bit, or says that it is damaged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from featray.stages import input_entry
from featray.stages.input_entry import pack, unpack

FACTS: dict[str, Any] = {"record": {"hu_min": -1024.0, "orientation": None}, "warnings": ["oblique"]}


def make_tensor(*shape: int) -> np.ndarray:
    tensor = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    tensor.flat[:5] = [0.0, -0.0, np.nan, np.inf, np.float32(1e-42)]
    return tensor


@pytest.mark.parametrize("chunk", [7, 1000, 2**24])
def test_an_entry_returns_every_bit_of_the_tensor_and_the_facts(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_entry, "_CHUNK_VOXELS", chunk)
    tensor = make_tensor(2, 5, 10, 20)
    facts, unpacked = unpack(pack(FACTS, tensor))
    assert facts == FACTS
    assert (unpacked.shape, unpacked.dtype, unpacked.flags.writeable) == (tensor.shape, np.float32, True)
    np.testing.assert_array_equal(unpacked.view(np.uint32), tensor.view(np.uint32))


@pytest.mark.parametrize("shape", [(0, 4, 4, 4), (1, 1, 1, 1)])
def test_an_entry_may_have_no_or_one_voxel(shape: tuple[int, ...]) -> None:
    tensor = np.zeros(shape, np.float32)
    assert unpack(pack({}, tensor))[1].shape == shape


def test_a_view_that_is_not_contiguous_is_packed_in_c_order() -> None:
    tensor = make_tensor(4, 6, 8)[:, ::2, 1:]
    np.testing.assert_array_equal(unpack(pack({}, tensor))[1], tensor)


def test_a_tensor_of_equal_values_takes_little_space() -> None:
    assert len(pack(FACTS, np.ones((1, 32, 64, 64), np.float32))) < 10_000


@pytest.mark.slow
def test_every_torn_entry_and_every_changed_byte_is_noticed() -> None:
    data = pack(FACTS, make_tensor(1, 4, 8, 8))
    for size in range(len(data)):
        with pytest.raises(ValueError, match=r"checksum|begin"):
            unpack(data[:size])
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x40
        with pytest.raises(ValueError, match=r"checksum|begin"):
            unpack(bytes(damaged))


def test_bytes_after_the_end_are_noticed() -> None:
    with pytest.raises(ValueError, match="checksum"):
        unpack(pack(FACTS, make_tensor(1, 4, 8, 8)) + b"\0")
