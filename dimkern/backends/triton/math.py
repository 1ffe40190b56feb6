"""The scalar functions that estimators are written in (`kernels/include/dimkern/math.h` in Triton)."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def log1p(u):
    """log(1 + u) of 0 <= u <= 1, to 3 units in the last place; a library's log takes twice the instructions."""
    y = u * 0.005253457929939032 - 0.02958850748836994
    y = y * u + 0.07836166769266129
    y = y * u - 0.13674770295619965
    y = y * u + 0.19111430644989014
    y = y * u - 0.24844369292259216
    y = y * u + 0.33319270610809326
    y = y * u - 0.49999502301216125
    return u * (y * u + 1.0)


@triton.jit
def sigmoid(x):
    u = exp(-tl.abs(x))
    # by the logarithm that softplus takes: where a tile needs both, the compiler makes it once
    return tl.where(x >= 0.0, 1.0, u) * exp(-log1p(u))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(exp(-tl.abs(x)))


@triton.jit
def tanh(x):
    u = exp(-2.0 * tl.abs(x))
    y = x * x
    # (1 - u) / (1 + u) loses the digits of a small x, its series does not
    series = x * (1.0 - y * (1.0 / 3.0 - y * (2.0 / 15.0 - y * (17.0 / 315.0))))
    return tl.where(y < 0.02, series, tl.where(x >= 0.0, 1.0, -1.0) * (1.0 - u) / (1.0 + u))
