"""Tables of big-endian 64-bit words, as arrays of integers."""

import array
import sys

Words = array.array  # of "Q"


def to_words(raw: bytes) -> "array.array[int]":
    """Whole words only: what is left over at the end is dropped."""
    words = array.array("Q", raw[: len(raw) & -8])
    if sys.byteorder == "little":
        words.byteswap()
    return words


def from_words(words: "array.array[int]") -> bytes:
    if sys.byteorder == "little":
        words = words[:]
        words.byteswap()
    return words.tobytes()
