"""Damage of a file: edits of its bytes, as strategies of Hypothesis."""

from __future__ import annotations

import struct
from typing import Literal

from hypothesis import strategies as st

Edit = tuple[str, int, int, bytes]
"""Kind of the edit, two numbers that select positions, and bytes to insert."""

NUMBERS = [0, 1, 2, 3, 127, 128, 255, 256, 2**15 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63]
SIZES: list[tuple[int, Literal["little", "big"]]] = [
    (size, order) for size in (1, 2, 4, 8) for order in ("little", "big")
]
FLOATS = [float("nan"), float("inf"), 1e38, -1.0, 1e-40]
TEXTS = ["9" * 20, "-1", "nan", "1e400", "\\", "\n", "\0" * 8, " " * 8, "0\\0\\0", "(1,0,0)"]
PIECES = [
    *((number % 256**size).to_bytes(size, order) for number in NUMBERS for size, order in SIZES),
    *(struct.pack(code, number) for number in FLOATS for code in ("<f", ">f", "<d", ">d")),
    *(text.encode() for text in TEXTS),
]
POSITIONS = st.one_of(st.integers(0, 120), st.integers(0, 1000), st.integers(0, 2**20))
EDITS: st.SearchStrategy[Edit] = st.one_of(
    st.tuples(st.just("flip"), POSITIONS, st.integers(0, 7), st.just(b"")),
    st.tuples(st.just("overwrite"), POSITIONS, st.just(0), st.sampled_from(PIECES)),
    st.tuples(st.just("overwrite"), POSITIONS, st.just(0), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("insert"), POSITIONS, st.just(0), st.binary(min_size=1, max_size=300)),
    st.tuples(st.just("delete"), POSITIONS, st.integers(1, 300), st.just(b"")),
    st.tuples(st.just("cut"), POSITIONS, st.just(0), st.just(b"")),
    st.tuples(st.just("swap"), POSITIONS, POSITIONS, st.just(b"")),
)
DAMAGE = st.tuples(st.integers(0, 4), st.lists(EDITS, min_size=1, max_size=3))


def apply_edits(data: bytes, edits: list[Edit]) -> bytes:
    for edit in edits:
        data = apply_edit(data, *edit) if data else data
    return data


def apply_edit(data: bytes, kind: str, where: int, second: int, piece: bytes) -> bytes:
    at = where % len(data)
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << second)]) + data[at + 1 :]
    if kind == "overwrite":
        return data[:at] + piece + data[at + len(piece) :]
    if kind == "insert":
        return data[:at] + piece + data[at:]
    if kind == "delete":
        return data[:at] + data[at + second :]
    if kind == "cut":
        return data[:at]
    low, high = sorted((at, second % len(data)))
    length = min(16, high - low)
    first, last = data[low : low + length], data[high : high + length]
    return data[:low] + last + data[low + length : high] + first + data[high + length :]
