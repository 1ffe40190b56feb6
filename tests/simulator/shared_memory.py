"""Shared memory of one block: poisoned, bounded, and watched for races between warps.

An *epoch* is what lies between two barriers of the whole block. Each 2-byte cell remembers who wrote it
last and who read it last, and in which epoch; two warps meeting in a cell within one epoch, one of them
writing, is a race.
"""

from __future__ import annotations

import numpy as np

from .errors import Hazard, OutOfBounds, Race
from .global_memory import WIDE

CELL = 2
_WHO = 64  # ids: warps count from 0, then
TENSOR_CORE, TMA, SEVERAL = 61, 62, 63


class SharedMemory:
    def __init__(self, size: int):
        self.size = size
        padded = -(-size // 16) * 16
        self.data = np.full(padded, 0xFF, np.uint8)  # NaN in every float type
        self.views = {n: self.data.view(dtype) for n, dtype in WIDE.items()}
        self.epoch = 1
        cells = padded // CELL
        self._write = np.zeros(cells, np.int32)  # epoch · 64 + who
        self._read = np.zeros(cells, np.int32)
        self._generic = np.zeros(cells, bool)  # written by threads, and no fence.proxy.async since

    def barrier(self) -> None:
        self.epoch += 1

    def load(self, addresses: np.ndarray, n: int, warps: np.ndarray) -> np.ndarray:
        """(lanes,) addresses to (lanes, n) bytes."""
        self._check(addresses, n, "load")
        self._track_read(addresses, n, warps[:, None])
        return self.views[n][addresses // n].view(np.uint8).reshape(-1, n)

    def store(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray) -> None:
        n = values.shape[1]
        self._check(addresses, n, "store")
        self._track_write(addresses, n, warps[:, None])
        index, view = addresses // n, self.views[n]
        view[index] = np.ascontiguousarray(values).view(WIDE[n]).reshape(-1)
        # several warps may hold a replicated value and all store it
        if (view[index].view(np.uint8).reshape(-1, n) != values).any():
            raise Race("one store writes different values to one shared address")

    def tensor_core_read(self, addresses: np.ndarray) -> None:
        """Checks that 16-byte rows may be read by the async proxy (wgmma or a TMA store), and records it."""
        rows = addresses // 16
        self._check(rows * 16, 16, "read by the async proxy")
        if self._generic.reshape(-1, 8)[rows].any():
            raise Race("the async proxy reads what threads wrote with no fence.proxy.async since")
        self._track_read(rows * 16, 16, np.full((rows.size, 1), TENSOR_CORE))

    def tma_write(self, address: int, size: int, warp: int) -> None:
        """Poisons what a TMA load will fill; nobody else may have touched it since the last barrier."""
        if address % 128 or address + size > self.size:
            raise OutOfBounds(f"TMA destination {address}+{size}: misaligned or outside {self.size} bytes")
        cells = slice(address // CELL, (address + size) // CELL)
        for last, verb in ((self._write, "wrote"), (self._read, "read")):
            who = last[cells][last[cells] // _WHO == self.epoch] % _WHO
            other = who[(who != warp) & (who != TMA)]
            if other.size:
                raise Race(f"a TMA load overwrites what {_name(other[0])} {verb} with no barrier since")
        self._generic[cells] = False
        self.data[address : address + size] = 0xFF

    def proxy_fence(self, warps: np.ndarray) -> None:
        """fence.proxy.async by these warps: the async proxy sees what they wrote."""
        self._generic &= ~np.isin(self._write % _WHO, warps)

    def _check(self, addresses: np.ndarray, n: int, kind: str) -> None:
        if addresses.size and (int(addresses.min()) < 0 or int(addresses.max()) + n > self.size):
            raise OutOfBounds(f"shared {kind} of {n} bytes at {int(addresses.max())}, of {self.size}")
        if (addresses & (n - 1)).any():
            raise OutOfBounds(f"misaligned shared {kind} of {n} bytes")

    def _rows(self, addresses: np.ndarray, n: int) -> tuple[int, np.ndarray]:
        width = max(1, n // CELL)
        return width, addresses // (width * CELL)

    def _track_read(self, addresses: np.ndarray, n: int, who: np.ndarray) -> None:
        width, rows = self._rows(addresses, n)
        write, read = self._write.reshape(-1, width), self._read.reshape(-1, width)
        mine = (self.epoch * _WHO + who).astype(np.int32)
        self._refuse("read", write[rows], who, "written")
        last = read[rows]
        read[rows] = np.where((last // _WHO == self.epoch) & (last != mine), self.epoch * _WHO + SEVERAL, mine)
        after = read[rows]
        if (after != mine).any():  # several warps, before or in this very instruction
            read[rows] = np.where(after != mine, self.epoch * _WHO + SEVERAL, after)

    def _track_write(self, addresses: np.ndarray, n: int, who: np.ndarray) -> None:
        width, rows = self._rows(addresses, n)
        write, read = self._write.reshape(-1, width), self._read.reshape(-1, width)
        self._refuse("write", write[rows], who, "written")
        self._refuse("write", read[rows], who, "read")
        write[rows] = self.epoch * _WHO + who
        self._generic.reshape(-1, width)[rows] = True

    def _refuse(self, verb: str, last: np.ndarray, who: np.ndarray, before: str) -> None:
        bad = (last // _WHO == self.epoch) & (last % _WHO != who)
        if bad.any():
            lane = int(np.nonzero(bad.any(1))[0][0])
            other = int(last[lane][bad[lane]][0]) % _WHO
            me = int(np.broadcast_to(who, bad.shape)[lane, 0])
            raise Race(f"shared memory: {_name(me)} {verb}s what {_name(other)} has {before}, with no barrier since")


def _name(who: int) -> str:
    names = {TENSOR_CORE: "the tensor core", TMA: "TMA", SEVERAL: "several warps"}
    return names.get(int(who), f"warp {int(who)}")


class AsyncQueue:
    """Groups of asynchronous work (cp.async, wgmma, bulk stores): it lands only when it is waited for."""

    def __init__(self, what: str):
        self.what = what
        self.open: list = []
        self.groups: list[list] = []

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: int) -> None:
        while len(self.groups) > pending:
            for land in self.groups.pop(0):
                land()

    def finish(self) -> None:
        if self.open or any(self.groups):
            raise Hazard(f"the block ended with {self.what} still in flight")
