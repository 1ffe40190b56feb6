"""One block of threads: its registers, its memories, and the order in which its threads run.

A register is one numpy vector over the threads of the block and is never changed in place. Threads run in
lockstep while they agree on the program counter. After a divergent branch each has its own, and the lowest
one runs first, so that they meet again where the paths join.
"""

from __future__ import annotations

import numpy as np

from .decode import Decoder, Mask
from .errors import Deadlock, SimulationError, Unsupported
from .global_memory import GlobalMemory
from .ptx import Program
from .shared_memory import AsyncQueue, SharedMemory

_MAX_STEPS = 20_000_000
_PLAIN, _BRANCH, _EXIT, _BARRIER = range(4)
_KINDS = {"bra": _BRANCH, "ret": _EXIT, "exit": _EXIT, "bar": _BARRIER, "barrier": _BARRIER}
# what a warp does together: some of its threads alone may not
_COLLECTIVE = {"mma", "ldmatrix", "stmatrix", "movmatrix", "elect", "wgmma"}


class _Undefined:
    """What a register holds before it is written."""

    def view(self, dtype):
        raise SimulationError("a register is read before it is written")


UNDEFINED = _Undefined()


class Code:
    """A decoded program."""

    def __init__(self, program: Program, threads: tuple[int, int, int]):
        self.program, self.threads = program, threads
        decoder = Decoder(program, int(np.prod(threads)))
        self.steps = []
        for i in program.instructions:
            guard = decoder.predicate(("!" if i.negated else "") + i.guard) if i.guard else None
            kind = _KINDS.get(i.name, _PLAIN)
            if kind == _BARRIER and "warp" in i.parts:
                kind = _PLAIN
            target = -1
            if kind == _BRANCH:
                target = program.labels.get(i.operands[0], -1)
                if target < 0:
                    raise Unsupported(f"branch to {i.operands[0]!r} in {i.text!r}")
            action = decoder.decode(i) if kind == _PLAIN else None
            self.steps.append((kind, guard, action, target, i.name in _COLLECTIVE, i))
        self.registers = len(decoder.slots)
        self.param_offsets, self.param_bytes = decoder.param_offsets, decoder.param_bytes


class Block:
    def __init__(
        self,
        code: Code,
        memory: GlobalMemory,
        params: bytes,
        index: tuple[int, int, int],
        grid: tuple[int, int, int],
        shared_bytes: int,
    ):
        self.code, self.memory, self.params = code, memory, params
        self.number = index[0] + grid[0] * (index[1] + grid[1] * index[2])
        self.threads = int(np.prod(code.threads))
        if self.threads % 32:
            raise Unsupported(f"a block of {self.threads} threads, which is no multiple of 32")
        self.lanes = np.arange(self.threads)
        self.warps = self.lanes // 32
        self.registers: list = [UNDEFINED] * code.registers
        self.shared = SharedMemory(code.program.shared_bytes + shared_bytes)
        self.local = np.full((self.threads, code.program.local_bytes), 0xFF, np.uint8)
        self.copies = AsyncQueue("cp.async")
        self.products = AsyncQueue("wgmma")
        self.bulk_stores = AsyncQueue("TMA stores")
        self.mbarriers: dict = {}
        self.tensor_map_drafts: dict[int, dict] = {}
        self._fragments: dict = {}
        self.counts = {"instructions": 0, "products": 0, "barriers": 0}
        x, y, _ = code.threads
        self._special = {"%laneid": self.lanes % 32, "%warpid": self.warps, "%nwarpid": self.threads // 32}
        for axis, values in enumerate((self.lanes % x, self.lanes // x % y, self.lanes // (x * y))):
            letter = "xyz"[axis]
            self._special |= {
                f"%tid.{letter}": values,
                f"%ntid.{letter}": code.threads[axis],
                f"%ctaid.{letter}": index[axis],
                f"%nctaid.{letter}": grid[axis],
                f"%clusterid.{letter}": index[axis],
                f"%nclusterid.{letter}": grid[axis],
                f"%cluster_ctaid.{letter}": 0,
                f"%cluster_nctaid.{letter}": 1,
            }
        self._special |= {"%cluster_ctarank": 0, "%cluster_nctarank": 1, "%lanemask_eq": 1 << (self.lanes % 32)}
        self._special["%lanemask_lt"] = (1 << (self.lanes % 32)) - 1

    def special(self, name: str) -> np.ndarray:
        if name not in self._special:
            raise Unsupported(f"special register {name}")
        return np.broadcast_to(np.asarray(self._special[name], np.uint32), self.threads)

    def put(self, slot: int, value: np.ndarray, mask: Mask) -> None:
        if mask is not None:
            old = self.registers[slot]
            if old is UNDEFINED:  # for the other threads: poison
                undefined = np.ones(1, bool) if value.dtype == np.bool_ else np.full(value.itemsize, 0xFF, np.uint8)
                old = undefined.view(value.dtype)
            value = np.where(mask, value, old.view(value.dtype))
        self.registers[slot] = value

    def fragments(self, reads, convert) -> np.ndarray:
        """convert(registers), remembered while the registers stay the same: a tile's rows meet many columns."""
        registers = [read(self) for read in reads]
        key = tuple(id(r.base if r.base is not None else r) for r in registers)
        if key not in self._fragments:
            if len(self._fragments) > 64:
                self._fragments.clear()
            # the registers are kept, so that their ids stay theirs
            self._fragments[key] = convert(registers), registers
        return self._fragments[key][0]

    def active(self, mask: Mask) -> np.ndarray:
        """The lanes of a mask."""
        return self.lanes if mask is None else np.nonzero(mask)[0]

    def run(self) -> None:
        end, position = len(self.code.steps), 0
        steps = self.code.steps
        count = 0
        while position < end:
            kind, guard, action, target, collective, i = steps[position]
            count += 1
            mask = None
            try:
                if guard is not None:
                    mask = guard(self)
                    if mask.all():
                        mask = None
                    elif not mask.any():
                        position += 1
                        continue
                if kind == _PLAIN:
                    if mask is not None and collective:
                        self._whole_warps(mask)
                    action(self, mask)
                    position += 1
                elif mask is not None:  # a branch, an exit or a barrier for some of the threads
                    position = self._diverged(np.full(self.threads, position))
                elif kind == _BARRIER:
                    self._barrier(i, self.threads)
                    position += 1
                else:
                    position = target if kind == _BRANCH else end
            except Exception as error:
                raise _located(error, i) from error
            if count > _MAX_STEPS:
                raise Deadlock(f"{_MAX_STEPS} instructions and no end, at: {i.text}")
        self.counts["instructions"] += count
        for queue in (self.copies, self.products, self.bulk_stores):
            queue.finish()

    def _diverged(self, pcs: np.ndarray) -> int:
        """Runs until every thread is at one place again and waits for nothing; returns that place."""
        steps = self.code.steps
        end = len(steps)
        at_barrier = np.zeros(self.threads, bool)
        for step in range(_MAX_STEPS):
            ready = ~at_barrier & (pcs < end)
            if not ready.any():
                if not at_barrier.any():
                    return end
                places = np.unique(pcs[at_barrier])
                # threads that have left the kernel no longer count
                alive = pcs < end
                if not (at_barrier | ~alive).all() or len(places) > 1:
                    raise Deadlock(f"barriers in different places: {[steps[p][5].text for p in places]}")
                self._barrier(steps[int(places[0])][5], int(at_barrier.sum()))
                pcs = np.where(at_barrier, pcs + 1, pcs)
                at_barrier[:] = False
                continue
            position = int(pcs[ready].min())
            here = ready & (pcs == position)
            if here.all() and step:
                return position
            kind, guard, action, target, collective, i = steps[position]
            self.counts["instructions"] += 1
            try:
                taken = here if guard is None else here & guard(self)
                if kind == _BARRIER:
                    at_barrier |= taken
                    pcs = np.where(here & ~taken, position + 1, pcs)
                elif kind == _PLAIN:
                    if taken.any():
                        if collective:
                            self._whole_warps(taken)
                        action(self, taken)
                    pcs = np.where(here, position + 1, pcs)
                else:
                    pcs = np.where(here, np.where(taken, target if kind == _BRANCH else end, position + 1), pcs)
            except Exception as error:
                raise _located(error, i) from error
        raise Deadlock(f"{_MAX_STEPS} instructions and no end")

    def _barrier(self, i, arrived: int) -> None:
        counts = [o for o in i.operands[1:] if o]
        expected = int(counts[0], 0) if counts else arrived
        if "sync" not in i.parts or expected != arrived:
            raise Unsupported(f"a barrier of {expected} of {arrived} threads")
        self.shared.barrier()
        self.counts["barriers"] += 1

    def _whole_warps(self, mask: np.ndarray) -> None:
        by_warp = mask.reshape(-1, 32)
        if (by_warp.any(1) != by_warp.all(1)).any():
            raise SimulationError("an instruction of whole warps is executed by some threads of a warp")


def _located(error: Exception, i) -> SimulationError:
    """The error, saying at which instruction."""
    if not isinstance(error, SimulationError):
        error = SimulationError(f"{type(error).__name__}: {error}")
    error.instruction = error.instruction or i.text
    return error
