"""Whole numbers in few bits, and sets of ids after Elias (1974) and Fano (1971): about 2 + log2(largest / count) bits an id.

The lowest bits of each id are packed as they are. What remains is a number that never decreases: mark ``remainder_i + i`` is set
in a row of bits, so that the i-th mark tells the i-th remainder. No loop over ids, neither to write nor to read them.
"""

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


def size(count: int, width: int) -> int:
    """Bytes of ``count`` numbers of ``width`` bits."""
    return (count * width + 7) // 8


def pack(numbers: Numbers, width: int) -> bytes:
    """The lowest ``width`` bits of every number ``[count]``, 0 or more, one behind the other; the first bit is the lowest."""
    places = np.arange(width)
    return np.packbits((numbers[:, None] >> places & 1).astype(np.uint8), bitorder="little").tobytes()


def unpack(packed: bytes, count: int, width: int) -> Numbers:
    """What ``pack`` wrote, ``[count]``; ``packed`` has ``size(count, width)`` bytes."""
    each = np.unpackbits(np.frombuffer(packed, np.uint8), count=count * width, bitorder="little").reshape(count, width)
    numbers: Numbers = each @ (1 << np.arange(width))
    return numbers


def low_width(ids: Numbers) -> int:
    """How many bits of increasing ``ids`` to pack as they are, so that both parts together are shortest."""
    return max((int(ids[-1]) // len(ids)).bit_length() - 1, 0)


def marks(ids: Numbers, low_width: int) -> bytes:
    """The increasing ``ids [count]`` without their ``low_width`` lowest bits, one mark each."""
    places = (ids >> low_width) + np.arange(len(ids))
    row = np.zeros(places[-1] + 1, np.uint8)
    row[places] = 1
    return np.packbits(row, bitorder="little").tobytes()


def highs(packed: bytes) -> Numbers:
    """What ``marks`` wrote: as many numbers as there are marks, never decreasing."""
    places = np.flatnonzero(np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little"))
    return places - np.arange(len(places))
