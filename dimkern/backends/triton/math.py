"""The scalar functions that estimators are written in (`kernels/include/dimkern/math.h` in Triton)."""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    u = tl.exp(-tl.abs(x))
    # log(1 + u) loses the digits of a small u, its series does not
    return tl.maximum(x, 0.0) + tl.where(u < 1e-3, u * (1.0 - u * (0.5 - u * (1.0 / 3.0))), tl.log(1.0 + u))
