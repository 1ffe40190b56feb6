"""The simulator's instructions, each against numpy, and its refusals; kernels are executed in tests/gpu_gates."""

import numpy as np
import pytest
from simulator import GlobalMemory, OutOfBounds, Race, SimulationError, Unsupported, launch

LANES = np.arange(32)


def run(body: str, x: np.ndarray, *, threads=32, size=None, shared=1024) -> np.ndarray:
    """Each thread has its element of x (32 bits) in %r1 and stores %r9."""
    memory = GlobalMemory()
    x = np.ascontiguousarray(x)
    out = np.zeros(threads if size is None else size, np.uint32)
    ptx = f"""
    .version 8.0
    .target sm_90a
    .visible .entry test(.param .u64 in, .param .u64 out) .reqntid {threads} {{
        .reg .pred %p<9>;
        .reg .b16 %rs<9>;
        .reg .b32 %r<20>;
        .reg .b64 %rd<9>;
        ld.param.u64 %rd1, [in];
        ld.param.u64 %rd2, [out];
        mov.u32 %r0, %tid.x;
        mul.wide.u32 %rd3, %r0, 4;
        add.s64 %rd4, %rd1, %rd3;
        add.s64 %rd5, %rd2, %rd3;
        ld.global.b32 %r1, [%rd4];
        {body}
        st.global.b32 [%rd5], %r9;
        ret;
    }}"""
    launch(ptx, (1,), [memory.add(x, "x"), memory.add(out, "out")], memory, shared_bytes=shared)
    return out


DRAW = np.random.default_rng(0)
FLOATS = np.concatenate([DRAW.normal(size=26) * 10, [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-3]]).astype(np.float32)
INTEGERS = np.concatenate([DRAW.integers(-(2**31), 2**31 - 1, 27), [0, 1, -1, 2**31 - 1, -(2**31)]]).astype(np.int32)
CASES = {
    "fma.rn.f32 %r9, %r1, %r1, 0f3F800000;": (FLOATS, lambda x: (x.astype(np.float64) ** 2 + 1).astype(np.float32)),
    "max.f32 %r9, %r1, 0f00000000;": (FLOATS, lambda x: np.fmax(x, np.float32(0))),
    "ex2.approx.ftz.f32 %r9, %r1;": (FLOATS, np.exp2),
    "setp.neu.f32 %p1, %r1, %r1; selp.b32 %r9, 1, 0, %p1;": (FLOATS, lambda x: np.isnan(x).astype(np.int32)),
    "setp.ne.f32 %p1, %r1, 0f00000000; selp.b32 %r9, 1, 0, %p1;": (
        FLOATS,
        lambda x: ((x != 0) & ~np.isnan(x)).astype(np.int32),
    ),
    "cvt.rzi.s32.f32 %r9, %r1;": (
        FLOATS,
        lambda x: np.clip(np.nan_to_num(np.trunc(x.astype(np.float64))), -(2**31), 2**31 - 1).astype(np.int32),
    ),
    "cvt.rn.f32.s32 %r9, %r1;": (INTEGERS, lambda x: x.astype(np.float32)),
    "mul.hi.s32 %r9, %r1, 1717986919;": (
        INTEGERS,
        lambda x: ((x.astype(np.int64) * 1717986919) >> 32).astype(np.int32),
    ),
    "div.s32 %r9, %r1, -7;": (INTEGERS, lambda x: np.trunc(x.astype(np.float64) / -7).astype(np.int32)),
    "rem.s32 %r9, %r1, 7;": (INTEGERS, lambda x: np.fmod(x, 7).astype(np.int32)),
    "shr.s32 %r9, %r1, 40;": (INTEGERS, lambda x: x >> 31),
    "shl.b32 %r9, %r1, 32;": (INTEGERS, lambda x: x * 0),
    "bfe.s32 %r9, %r1, 4, 8;": (INTEGERS, lambda x: ((x >> 4) & 255).astype(np.int8).astype(np.int32)),
    "prmt.b32 %r9, %r1, 0, 0x0123;": (INTEGERS, lambda x: x.byteswap()),
    "lop3.b32 %r9, %r1, 255, 3855, 0x96;": (INTEGERS, lambda x: x ^ 255 ^ 3855),
    "shf.l.wrap.b32 %r9, %r1, %r1, 8;": (
        INTEGERS.view(np.uint32),
        lambda x: (x << np.uint32(8)) | (x >> np.uint32(24)),
    ),
    "cvt.u16.u32 %rs1, %r1; cvt.s32.s16 %r9, %rs1;": (INTEGERS, lambda x: x.astype(np.int16).astype(np.int32)),
    "shfl.sync.bfly.b32 %r9|%p1, %r1, 5, 31, -1;": (INTEGERS, lambda x: x[LANES ^ 5]),
    "shfl.sync.down.b32 %r9, %r1, 3, 31, -1;": (INTEGERS, lambda x: np.where(LANES + 3 < 32, np.roll(x, -3), x)),
    "setp.gt.s32 %p1, %r1, 0; vote.sync.ballot.b32 %r9, %p1, -1;": (
        INTEGERS,
        lambda x: np.full(32, (1 << LANES.astype(np.uint64))[x > 0].sum(), np.uint32),
    ),
}


@pytest.mark.parametrize("body", CASES)
def test_instruction(body):
    x, expected = CASES[body]
    found = run(body, x)
    with np.errstate(all="ignore"):
        wanted = expected(x)
    np.testing.assert_array_equal(found.view(wanted.dtype), wanted)


def test_packed_bfloat16_rounds_to_even():
    x = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-9, 3.14159], np.float32).repeat(8)
    found = run("cvt.rn.bf16x2.f32 %r9, %r1, %r1;", x)
    rounded = np.array([1.0, 1 + 2.0**-6, -1.0, 3.140625], np.float32).repeat(8)
    np.testing.assert_array_equal((found & np.uint32(0xFFFF0000)).view(np.float32), rounded)
    np.testing.assert_array_equal(found << np.uint32(16), found & np.uint32(0xFFFF0000))


def test_threads_part_and_meet_again():
    """A loop whose length differs from thread to thread, then a shuffle of them all."""
    body = """
        mov.u32 %r2, 0;
        mov.u32 %r3, 0;
    loop:
        setp.ge.u32 %p1, %r2, %r0;
        @%p1 bra done;
        add.u32 %r3, %r3, %r1;
        add.u32 %r2, %r2, 1;
        bra loop;
    done:
        shfl.sync.bfly.b32 %r9, %r3, 1, 31, -1;"""
    x = LANES.astype(np.uint32) + 3
    np.testing.assert_array_equal(run(body, x), (x * LANES)[LANES ^ 1])


EXCHANGE = """
    shl.b32 %r2, %r0, 2;
    st.shared.b32 [%r2], %r1;
    {barrier}
    xor.b32 %r3, %r2, 128;
    ld.shared.b32 %r9, [%r3];"""


def test_shared_memory_needs_its_barrier():
    x = np.arange(64, dtype=np.uint32)
    found = run(EXCHANGE.format(barrier="bar.sync 0;"), x, threads=64)
    np.testing.assert_array_equal(found, np.roll(x, 32))
    with pytest.raises(Race, match="no barrier since"):
        run(EXCHANGE.format(barrier=""), x, threads=64)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("mov.u32 %r9, %r8;", SimulationError, "before it is written"),
        ("cvt.rz.bf16.f32 %rs1, %r1; mov.u32 %r9, 0;", Unsupported, "not modelled"),
        ("frobnicate.b32 %r9, %r1;", Unsupported, "frobnicate is not modelled\n  at: frobnicate"),
        ("shl.b32 %r2, %r0, 2; ld.shared.b32 %r9, [%r2+1000];", OutOfBounds, "of 1024"),
        ("ld.global.b32 %r9, [%rd4+4];", OutOfBounds, "beyond the end of x"),
        ("ld.global.b32 %r9, [%rd4+2];", OutOfBounds, "misaligned"),
        ("st.global.b32 [%rd2], %r0; mov.u32 %r9, 0;", Race, "different values"),
        ("trap; mov.u32 %r9, 0;", SimulationError, "trapped"),
    ],
)
def test_a_fault_raises(body, error, message):
    with pytest.raises(error, match=message):
        run(body, INTEGERS)


def test_an_unknown_instruction_in_a_branch_never_taken_does_no_harm():
    assert (run("bra over; frobnicate.b32 %r9, %r1; over: mov.u32 %r9, 7;", INTEGERS) == 7).all()


def test_a_barrier_that_some_threads_never_reach():
    """Threads that have left no longer count; threads waiting elsewhere never meet."""
    left = "setp.lt.u32 %p1, %r0, 32; mov.u32 %r9, 1; @%p1 ret; bar.sync 0;"
    np.testing.assert_array_equal(
        run(left, np.zeros(64, np.uint32), threads=64), (np.arange(64) >= 32).astype(np.uint32)
    )
    apart = "setp.lt.u32 %p1, %r0, 32; mov.u32 %r9, 1; @%p1 bra other; bar.sync 0; bra end; other: bar.sync 0; end:"
    with pytest.raises(SimulationError, match="different places"):
        run(apart, np.zeros(64, np.uint32), threads=64)
