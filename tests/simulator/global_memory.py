"""Global memory: the launch's arguments at invented addresses with gaps between them, checked at every access."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from .errors import OutOfBounds, Race

_GAP = 1 << 16
_CELL = 2  # bytes; races are looked for at this grain
_NOBODY, _SEVERAL, _ATOMIC = -1, -2, -3
WIDE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


class Segment:
    """The bytes of one argument; `start` is the address of `data[0]`, accesses lie in [low, high)."""

    def __init__(self, data: np.ndarray, start: int, low: int, high: int, name: str):
        self.data, self.start, self.low, self.high, self.name = data, start, low, high, name
        self.views = {n: data[: data.size // n * n].view(dtype) for n, dtype in WIDE.items()}
        cells = data.size // _CELL + 1
        self.writer = np.full(cells, _NOBODY, np.int32)
        self.reader = np.full(cells, _NOBODY, np.int32)


class GlobalMemory:
    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._lows: list[int] = []
        self._top = 1 << 20
        self.tensor_maps: dict[int, object] = {}  # address of a CUtensorMap -> tma.TensorMap

    def add(self, data: np.ndarray, name: str, low: int = 0, high: int | None = None, alignment: int = 256) -> int:
        """Registers bytes [low, high) of contiguous `data`; returns the address of data[0]."""
        raw = data.reshape(-1).view(np.uint8)
        # the address has the alignment that the array really has: the compiler may have relied on it
        start = -(-self._top // alignment) * alignment + raw.ctypes.data % alignment
        high = raw.size if high is None else high
        self._segments.append(Segment(raw, start, start + low, start + high, name))
        self._lows.append(start + low)
        self._top = start + raw.size + _GAP
        return start

    def extend(self, start: int, low: int, high: int) -> None:
        """Another argument with the same data: what lies between the two belongs to neither, but passes."""
        index = next(n for n, segment in enumerate(self._segments) if segment.start == start)
        segment = self._segments[index]
        segment.low, segment.high = min(segment.low, start + low), max(segment.high, start + high)
        self._lows[index] = segment.low

    def reset_races(self) -> None:
        for segment in self._segments:
            segment.writer[:] = _NOBODY
            segment.reader[:] = _NOBODY

    def load(self, addresses: np.ndarray, n: int, block: int) -> np.ndarray:
        """(lanes,) addresses to (lanes, n) bytes."""
        out = np.empty((addresses.size, n), np.uint8)
        for segment, lanes, offsets in self._find(addresses, n, "load"):
            _mark_read(segment, offsets, n, block)
            out[lanes] = segment.views[n][offsets // n].view(np.uint8).reshape(-1, n)
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray, block: int) -> None:
        """(lanes, n) bytes to (lanes,) addresses."""
        n = values.shape[1]
        packed = np.ascontiguousarray(values).view(WIDE[n]).reshape(-1)
        for segment, lanes, offsets in self._find(addresses, n, "store"):
            index, view = offsets // n, segment.views[n]
            same = (view[index].view(np.uint8).reshape(-1, n) == values[lanes]).all(1)
            _mark_write(segment, offsets, n, block, same)
            view[index] = packed[lanes]
            if (view[index].view(np.uint8).reshape(-1, n) != values[lanes]).any():
                raise Race(f"one store writes different values to one address of {segment.name}")

    def atomic(self, addresses: np.ndarray, dtype: type, update, block: int) -> np.ndarray:
        """update(old, lane) -> new, lane by lane; returns the old values."""
        n = np.dtype(dtype).itemsize
        old = np.empty(addresses.size, dtype)
        for segment, lanes, offsets in self._find(addresses, n, "atomic"):
            cells = offsets // _CELL
            seen = segment.writer[cells]
            if ((seen != _NOBODY) & (seen != _ATOMIC)).any():
                raise Race(f"an atomic on an element of {segment.name} that was stored plainly")
            if ((segment.reader[cells] != _NOBODY) & (segment.reader[cells] != block)).any():
                raise Race(f"an atomic on an element of {segment.name} that another block read")
            for part in range(max(1, n // _CELL)):
                segment.writer[cells + part] = _ATOMIC
            view = segment.views[n].view(dtype)
            for lane, index in zip(lanes, offsets // n, strict=True):
                old[lane] = view[index]
                view[index] = update(view[index], lane)
        return old

    def _find(self, addresses: np.ndarray, n: int, kind: str):
        """Yields (segment, lanes, offsets into its data) for accesses of n bytes."""
        if not addresses.size:
            return
        low, high = int(addresses.min()), int(addresses.max())
        if (addresses & (n - 1)).any():
            raise OutOfBounds(f"misaligned global {kind} of {n} bytes")
        position = bisect_right(self._lows, low) - 1
        if position >= 0 and high + n <= self._segments[position].high:
            segment = self._segments[position]
            yield segment, np.arange(addresses.size), addresses - segment.start
            return
        positions = np.searchsorted(self._lows, addresses, side="right") - 1
        for position in np.unique(positions):
            lanes = np.nonzero(positions == position)[0]
            segment = self._segments[position] if position >= 0 else None
            if segment is None or (addresses[lanes] + n > segment.high).any():
                raise OutOfBounds(self._outside(addresses[lanes], n, kind))
            yield segment, lanes, addresses[lanes] - segment.start

    def _outside(self, addresses: np.ndarray, n: int, kind: str) -> str:
        address = int(addresses.max())
        position = bisect_right(self._lows, address) - 1
        if position < 0:
            return f"global {kind} of {n} bytes at {address:#x}, below every argument"
        segment = self._segments[position]
        return f"global {kind} of {n} bytes {address - segment.high + n} bytes beyond the end of {segment.name}"


def _cells(offsets: np.ndarray, n: int) -> np.ndarray:
    first = offsets // _CELL
    return first if n <= _CELL else (first[:, None] + np.arange(n // _CELL)).reshape(-1)


def _mark_read(segment: Segment, offsets: np.ndarray, n: int, block: int) -> None:
    cells = _cells(offsets, n)
    writer = segment.writer[cells]
    if ((writer != _NOBODY) & (writer != block)).any():
        raise Race(f"a read of an element of {segment.name} that another block writes")
    reader = segment.reader[cells]
    segment.reader[cells] = np.where((reader == _NOBODY) | (reader == block), block, _SEVERAL)


def _mark_write(segment: Segment, offsets: np.ndarray, n: int, block: int, same: np.ndarray) -> None:
    """`same`: lanes that write what is there already; blocks that agree on a value do not race."""
    cells = _cells(offsets, n)
    reader, writer = segment.reader[cells], segment.writer[cells]
    if ((reader != _NOBODY) & (reader != block)).any():
        raise Race(f"a write of an element of {segment.name} that another block reads")
    other = (writer != _NOBODY) & (writer != block)
    if n > _CELL:
        other = other.reshape(-1, n // _CELL).any(1)
    if (other & ~same).any():
        raise Race(f"two blocks write the same element of {segment.name}")
    segment.writer[cells] = block
