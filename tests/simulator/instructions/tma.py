"""TMA (cp.async.bulk.tensor), the descriptors it reads, and the mbarriers that count its bytes.

A load poisons its destination when it starts and lands when somebody waits for its barrier; a store is
made when its group is waited for, and its source must not have changed until then.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ..decode import SHARED_WINDOW, Action, Decoder, instruction
from ..errors import Deadlock, Hazard, Race, SimulationError, Unsupported
from ..ptx import Instruction
from .wgmma import swizzle


@dataclass(frozen=True)
class TensorMap:
    """What a CUtensorMap holds; sizes run from the outermost dimension to the innermost."""

    address: int  # global
    shape: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # bytes
    box: tuple[int, ...]  # elements that one copy moves
    element: int  # bytes
    swizzle: int  # as in a matrix descriptor: 0 none, 1 128 bytes, 2 64, 3 32

    def __post_init__(self):
        if self.address % 16 or any(stride % 16 for stride in self.strides[:-1]):
            raise SimulationError(f"a TMA descriptor wants 16-byte alignment: {self}")
        if self.strides[-1] != self.element or any(not 0 < b <= 256 for b in self.box):
            raise SimulationError(f"a TMA descriptor that hardware refuses: {self}")
        if self.swizzle and self.box[-1] * self.element > {1: 128, 2: 64, 3: 32}[self.swizzle]:
            raise SimulationError(f"a TMA box wider than its swizzle: {self}")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.element

    def elements(self, start: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """(global addresses, inside the tensor?) of a box at `start` (outermost first), flattened."""
        addresses, inside = np.full(1, self.address, np.int64), np.ones(1, bool)
        for first, extent, stride, box in zip(start, self.shape, self.strides, self.box, strict=True):
            at = first + np.arange(box)
            addresses = (addresses[:, None] + at * stride).reshape(-1)
            inside = (inside[:, None] & (at >= 0) & (at < extent)).reshape(-1)
        return addresses, inside


class MBarrier:
    def __init__(self, count: int, epoch: int, warp: int):
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0
        self.loads: list = []
        self._made = epoch, warp
        self._used: tuple[int, set[int]] = epoch, set()  # by which warps, since which barrier of the block

    def use(self, epoch: int, warp: int, ends: bool) -> None:
        """By one warp; making an mbarrier and ending one want a barrier between them and other warps' uses."""
        if self._made[0] == epoch and self._made[1] != warp:
            raise Race("an mbarrier is used by another warp than its maker's with no barrier since it was made")
        if self._used[0] != epoch:
            self._used = epoch, set()
        self._used[1].add(warp)
        if ends and len(self._used[1]) > 1:
            raise Race("an mbarrier is ended while another warp may still use it: there was no barrier since")

    def advance(self) -> None:
        if self.pending < 0:
            raise SimulationError("more arrivals at an mbarrier than it counts")
        if self.pending == 0 and self.bytes == 0 and not self.loads:
            self.phase ^= 1
            self.pending = self.count


@instruction("mbarrier")
def mbarrier(i: Instruction, d: Decoder) -> Action:
    i.allow("init inval arrive expect_tx try_wait test_wait parity shared cta cluster release acquire")
    what = i.parts[1]
    if what in ("try_wait", "test_wait"):
        return _wait(i, d)
    operand = i.operands[1] if what == "arrive" else i.operands[0]
    address = d.address(operand, 4)
    number = d.raw(i.operands[-1], 4) if what == "init" or "expect_tx" in i.parts else None

    def run(block, mask):
        lanes = block.active(mask)
        for lane in lanes:
            where = int(address(block)[lane])
            if where % 8 or not 0 <= where <= block.shared.size - 8:
                raise SimulationError("an mbarrier is misaligned or outside the shared allocation")
            if what == "init":
                block.mbarriers[where] = MBarrier(int(number(block)[lane]), block.shared.epoch, int(block.warps[lane]))
            elif what == "inval":
                if _barrier(block, where, lane, ends=True).loads:
                    raise Hazard("an mbarrier is invalidated with loads in flight")
                del block.mbarriers[where]
            else:
                barrier = _barrier(block, where, lane)
                barrier.bytes += int(number(block)[lane]) if number else 0
                barrier.pending -= 1
                barrier.advance()

    return run


def _barrier(block, address: int, lane: int, ends: bool = False) -> MBarrier:
    if address not in block.mbarriers:
        raise SimulationError(f"no mbarrier was initialised at {address}")
    barrier = block.mbarriers[address]
    barrier.use(block.shared.epoch, int(block.warps[lane]), ends)
    return barrier


def _wait(i: Instruction, d: Decoder) -> Action:
    if "parity" not in i.parts:
        raise Unsupported("an mbarrier wait by state")
    write, address, parity = d.write_predicate(i.operands[0]), d.address(i.operands[1], 4), d.raw(i.operands[2], 4)

    def run(block, mask):
        lanes = block.active(mask)
        for where in np.unique(address(block)[lanes]):
            mine = lanes[address(block)[lanes] == where]
            for lane in mine[::32]:
                barrier = _barrier(block, int(where), lane)
            loads, barrier.loads = barrier.loads, []
            for land in loads:
                land()
            barrier.advance()
            if (barrier.phase == (parity(block)[mine] & 1)).any():
                missing = f"{barrier.pending} arrivals and {barrier.bytes} bytes are missing"
                raise Deadlock(f"an mbarrier wait that never ends: {missing}")
        write(block, np.ones(block.threads, bool), mask)

    return run


def bulk(i: Instruction, d: Decoder) -> Action:
    if "commit_group" in i.parts:
        return lambda block, mask: block.bulk_stores.commit()
    if "wait_group" in i.parts:
        pending = int(i.operands[0], 0)
        return lambda block, mask: block.bulk_stores.wait(pending)
    i.allow(
        "async bulk tensor 1d 2d 3d 4d 5d shared cluster cta global mbarrier complete_tx bytes bulk_group tile L2 "
        "cache_hint"
    )
    if "tensor" not in i.parts:
        raise Unsupported("cp.async.bulk without a tensor")
    return _load(i, d) if "mbarrier" in i.parts else _store(i, d)


def _box(operand: str, d: Decoder):
    """(reads the descriptor's address, [reads a coordinate, innermost first])."""
    found = re.fullmatch(r"\[\s*([^,\s]+)\s*,\s*\{(.*)\}\s*\]", operand)
    if not found:
        raise Unsupported(f"TMA operand {operand}")
    return d.raw(found[1], 8), [d.raw(c.strip(), 4) for c in found[2].split(",")]


def _boxes(block, mask, descriptor, coordinates):
    """Yields (lane, its TensorMap, its start, outermost dimension first)."""
    for lane in block.active(mask):
        address = int(descriptor(block)[lane])
        tensor_map = block.memory.tensor_maps.get(address)
        if tensor_map is None:
            raise SimulationError(f"no TMA descriptor at {address:#x}")
        start = [int(read(block).view(np.int32)[lane]) for read in reversed(coordinates)]
        yield lane, tensor_map, start


def _load(i: Instruction, d: Decoder) -> Action:
    target, barrier_at = d.address(i.operands[0], 4), d.address(i.operands[2], 4)
    descriptor, coordinates = _box(i.operands[1], d)

    def run(block, mask):
        for lane, tensor_map, start in _boxes(block, mask, descriptor, coordinates):
            to = int(target(block)[lane])
            barrier = _barrier(block, int(barrier_at(block)[lane]), lane)
            block.shared.tma_write(to, tensor_map.bytes, int(block.warps[lane]))
            addresses, inside = tensor_map.elements(start)
            data = np.zeros((addresses.size, tensor_map.element), np.uint8)  # beyond the tensor lie zeros
            data[inside] = block.memory.load(addresses[inside], tensor_map.element, block.number)
            places = swizzle(to + np.arange(tensor_map.bytes), tensor_map.swizzle)

            def land(places=places, data=data, barrier=barrier, size=tensor_map.bytes):
                block.shared.data[places] = data.reshape(-1)
                barrier.bytes -= size

            barrier.loads.append(land)

    return run


def _store(i: Instruction, d: Decoder) -> Action:
    descriptor, coordinates = _box(i.operands[0], d)
    source = d.address(i.operands[1], 4)

    def run(block, mask):
        for lane, tensor_map, start in _boxes(block, mask, descriptor, coordinates):
            at = int(source(block)[lane])
            places = swizzle(at + np.arange(tensor_map.bytes), tensor_map.swizzle)
            if at % 128 or int(places.max()) >= block.shared.size:
                raise SimulationError("the source of a TMA store is misaligned or outside the shared allocation")
            block.shared.tensor_core_read(np.unique(places // 16) * 16)
            seen = block.shared.data[places].copy()
            addresses, inside = tensor_map.elements(start)

            def land(places=places, seen=seen, addresses=addresses, inside=inside, size=tensor_map.element):
                if (block.shared.data[places] != seen).any():
                    raise Hazard("the source of a TMA store is overwritten before cp.async.bulk.wait_group")
                block.memory.store(addresses[inside], seen.reshape(-1, size)[inside], block.number)

            block.bulk_stores.open.append(land)

    return run


_FIELDS = (
    "global_address rank box_dim global_dim global_stride element_stride elemtype interleave_layout swizzle_mode "
    "fill_mode"
)


@instruction("tensormap")
def tensor_map(i: Instruction, d: Decoder) -> Action:
    """A descriptor that the kernel makes: its fields are replaced in shared memory, then it is copied to global."""
    if "cp_fenceproxy" in i.parts:
        return _publish(i, d)
    i.allow("replace tile shared cta b1024 b64 b32", _FIELDS)
    field = next(part for part in i.parts if part in _FIELDS.split())
    base = i.operands[0].strip("[] ")
    address = d.address(i.operands[0], d.width(base) if d.is_register(base) else 4)
    ordinal = int(i.operands[1], 0) if len(i.operands) == 3 else 0
    value = d.raw(i.operands[-1], 8 if i.parts[-1] == "b64" else 4)

    def run(block, mask):
        for lane in block.active(mask):
            where = int(address(block)[lane]) & (SHARED_WINDOW - 1)
            block.tensor_map_drafts.setdefault(where, {})[field, ordinal] = int(value(block)[lane])

    return run


_ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2, 11: 4, 12: 4}
_SWIZZLE_MODES = {0: 0, 1: 3, 2: 2, 3: 1}  # none, 32, 64, 128 bytes


def _publish(i: Instruction, d: Decoder) -> Action:
    target, base = d.address(i.operands[0]), i.operands[1].strip("[] ")
    source = d.address(i.operands[1], d.width(base) if d.is_register(base) else 4)

    def run(block, mask):
        to, at = int(target(block)[block.active(mask)][0]), int(source(block)[block.active(mask)][0])
        draft = block.tensor_map_drafts[at & (SHARED_WINDOW - 1)]
        rank = draft["rank", 0] + 1
        element = _ELEMENT_BYTES[draft["elemtype", 0]]
        inner_first = [draft["global_stride", axis] for axis in range(rank - 1)]
        block.memory.load(np.array([to]), 16, block.number)  # it has to be the kernel's to write
        block.memory.tensor_maps[to] = TensorMap(
            draft["global_address", 0],
            tuple(draft["global_dim", axis] for axis in reversed(range(rank))),
            (*reversed(inner_first), element),
            tuple(draft["box_dim", axis] for axis in reversed(range(rank))),
            element,
            _SWIZZLE_MODES[draft["swizzle_mode", 0]],
        )

    return run
