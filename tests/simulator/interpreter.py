"""Triton's interpreter, mended and watched.

    with interpreted(seed=1):
        kernel[grid](cpu_tensors, ...)

Stock, its bfloat16 dot multiplies raw bits, its float32 → bfloat16 truncates, and TF32 is ignored. Here they
are what a GPU computes. Watched: an unmasked lane outside the launch's tensors, an element that two programs
touch with one of them writing, one store that writes an address twice. Programs run in a shuffled order.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, ReduceOps, TensorHandle
from triton.runtime.jit import JITFunction

from .errors import OutOfBounds, Race, Unsupported
from .floats import bf16_to_f32, f32_to_bf16, round_tf32

_NOBODY, _SEVERAL, _ATOMIC = -1, -2, -3
_CELL = 2  # bytes


@contextlib.contextmanager
def interpreted(seed: int | None = 0) -> Iterator[None]:
    """Kernels launched inside are interpreted, though they were made for the compiler; None keeps their order."""
    watch = _Watch(seed)
    with contextlib.ExitStack() as stack:
        for owner, name, mend in _mends(watch):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, mend(getattr(owner, name)))
        yield


def _mends(watch: _Watch):
    """(class, method, a function of the stock method that gives the mended one)."""
    builder = InterpreterBuilder
    return [
        (JITFunction, "run", lambda stock: _launch),
        (JITFunction, "__call__", lambda stock: _call),
        (builder, "create_dot", _dot),
        (builder, "cast_impl", _converting),
        (builder, "create_fp_to_fp", _converting),
        (builder, "binary_op", _binary),
        (builder, "unary_op", _unary),
        (builder, "create_masked_load", watch.accessing("load", mask=1)),
        (builder, "create_masked_store", watch.accessing("store", mask=2)),
        (builder, "create_atomic_rmw", watch.atomic),
        (builder, "set_grid_dim", watch.grid),
        (builder, "set_grid_idx", watch.program),
        (ReduceOps, "apply_impl", _reduction),
        (GridExecutor, "_init_args_hst", watch.arguments),
    ]


def _launch(function: JITFunction, *args, **options):
    return InterpretedFunction(function.fn).run(*args, **options)


def _call(function: JITFunction, *args, **options):
    """One kernel calling another; stock, the language would stay patched after it."""
    scope = interpreter._patch_lang(function.fn)
    try:
        return InterpretedFunction(function.fn).rewrite()(*args, **options)
    finally:
        scope.restore()


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _dot(stock):
    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right = a.data, b.data
        if _is_bf16(a) != _is_bf16(b):
            raise Unsupported("a dot of bfloat16 with another type")
        if _is_bf16(a):
            left, right = bf16_to_f32(left), bf16_to_f32(right)
        elif a.dtype.scalar == tl.float32 and str(input_precision).upper().endswith("TF32"):
            left, right = (round_tf32(np.ascontiguousarray(x)).view(np.float32) for x in (left, right))
        elif a.dtype.scalar.primitive_bitwidth == 8:
            return stock(self, a, b, d, input_precision, max_num_imprecise_acc)
        kind = d.data.dtype
        return TensorHandle(np.matmul(left.astype(kind), right.astype(kind)) + d.data, d.dtype.scalar)

    return create_dot


def _converting(stock):
    def convert(self, source, target, *rounding):
        is_bf16, wants_bf16 = _is_bf16(source), target.scalar == tl.bfloat16
        if is_bf16 and not wants_bf16:
            value = bf16_to_f32(source.data)
            return TensorHandle(value.astype(interpreter._get_np_dtype(target)), target.scalar)
        if wants_bf16 and not is_bf16:
            return TensorHandle(f32_to_bf16(source.data.astype(np.float32)), target.scalar)
        return stock(self, source, target, *rounding)

    return convert


def _binary(stock):
    def binary_op(self, a, b, operation):
        if not _is_bf16(a):
            return stock(self, a, b, operation)
        value = operation(bf16_to_f32(a.data), bf16_to_f32(b.data))
        if value.dtype == np.bool_:
            return TensorHandle(value, tl.int1)
        return TensorHandle(f32_to_bf16(value), tl.bfloat16)

    return binary_op


def _unary(stock):
    def unary_op(self, a, operation):
        if not _is_bf16(a):
            return stock(self, a, operation)
        return TensorHandle(f32_to_bf16(operation(bf16_to_f32(a.data))), tl.bfloat16)

    return unary_op


def _reduction(stock):
    def apply_impl(self, values):
        first = values[0] if isinstance(values, tuple) else values
        if _is_bf16(first.handle):
            raise Unsupported("a reduction of bfloat16 in the interpreter: cast to float32 first")
        return stock(self, values)

    return apply_impl


class _Tensor:
    """The bytes of one storage, and which programs touched each 2-byte cell."""

    def __init__(self, storage):
        self.low, self.high = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        cells = storage.nbytes() // _CELL + 1
        self.writer, self.reader = np.full(cells, _NOBODY, np.int32), np.full(cells, _NOBODY, np.int32)


class _Watch:
    """Follows one launch at a time."""

    def __init__(self, seed: int | None):
        self.seed = seed
        self._tensors: list[_Tensor] = []
        self._order: list[int] = []
        self._extent = (1, 1, 1)
        self._program = 0

    def arguments(self, stock):
        def init(executor, args, kwargs):
            host_args, host_kwargs = stock(executor, args, kwargs)
            storages = {}
            for value in (*host_args, *host_kwargs.values()):
                tensor = getattr(value, "base", value)  # of a descriptor
                if hasattr(tensor, "untyped_storage"):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage
            self._tensors = [_Tensor(storage) for storage in storages.values()]
            return host_args, host_kwargs

        return init

    def grid(self, stock):
        def set_grid_dim(builder, x, y, z):
            stock(builder, x, y, z)
            self._extent, self._order = (x, y, z), list(range(x * y * z))
            if self.seed is not None:
                random.Random(self.seed).shuffle(self._order)

        return set_grid_dim

    def program(self, stock):
        def set_grid_idx(builder, x, y, z):
            _, rows, layers = self._extent
            self._program = n = self._order[(x * rows + y) * layers + z]
            return stock(builder, n // (rows * layers), n // layers % rows, n % layers)

        return set_grid_idx

    def accessing(self, kind: str, mask: int):
        def mend(stock):
            def access(builder, pointers, *rest, **hints):
                self._access(kind, pointers, rest[mask - 1])
                return stock(builder, pointers, *rest, **hints)

            return access

        return mend

    def atomic(self, stock):
        def create_atomic_rmw(builder, operation, pointer, value, mask, *rest):
            self._access("atomic", pointer, mask)
            return stock(builder, operation, pointer, value, mask, *rest)

        return create_atomic_rmw

    def _access(self, kind: str, pointers: TensorHandle, mask: TensorHandle) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        chosen = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape).ravel()
        addresses = np.asarray(pointers.data).astype(np.int64).ravel()[chosen]
        for tensor in self._tensors:
            inside = (addresses >= tensor.low) & (addresses + size <= tensor.high)
            if inside.any():
                self._mark(kind, tensor, (addresses[inside] - tensor.low) // _CELL)
                addresses = addresses[~inside]
        if addresses.size:
            raise OutOfBounds(f"{addresses.size} lanes of a {kind} lie outside every tensor of the launch")

    def _mark(self, kind: str, tensor: _Tensor, cells: np.ndarray) -> None:
        me = self._program
        writer, reader = tensor.writer[cells], tensor.reader[cells]
        if kind == "load":
            if ((writer != _NOBODY) & (writer != me)).any():
                raise Race("a program reads an element that another writes")
            tensor.reader[cells] = np.where((reader == _NOBODY) | (reader == me), me, _SEVERAL)
            return
        if ((reader != _NOBODY) & (reader != me)).any():
            raise Race("a program writes an element that another reads")
        if kind == "atomic":
            if ((writer != _NOBODY) & (writer != _ATOMIC)).any():
                raise Race("an atomic on an element that was stored plainly")
            tensor.writer[cells] = _ATOMIC
            return
        if ((writer != _NOBODY) & (writer != me)).any():
            raise Race("two programs write one element")
        if np.unique(cells).size != cells.size:
            raise Race("one store writes an element twice")
        tensor.writer[cells] = me
