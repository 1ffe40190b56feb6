"""Written by kernels/emit.py from dimkern/estimators.py; do not edit."""

import triton
import triton.language as tl

from .math import exp, sigmoid, softplus

one = tl.constexpr(1.0)
half = tl.constexpr(0.5)
quarter = tl.constexpr(0.25)
log2 = tl.constexpr(0.6931471805599453)


@triton.jit
def infonce_f(s):
    return s


@triton.jit
def infonce_df(s):
    return one


@triton.jit
def infonce_psi(s, ref):
    return exp(s - ref)


@triton.jit
def infonce_phi(s, ref):
    return exp(s - ref)


@triton.jit
def dv_f(s):
    return s


@triton.jit
def dv_df(s):
    return one


@triton.jit
def dv_psi(s, ref):
    return exp(s - ref)


@triton.jit
def dv_phi(s, ref):
    return exp(s - ref)


@triton.jit
def jsd_f(s):
    return log2 - softplus(-s)


@triton.jit
def jsd_df(s):
    return sigmoid(-s)


@triton.jit
def jsd_psi(s, ref):
    return softplus(s) - log2


@triton.jit
def jsd_phi(s, ref):
    return sigmoid(s)


@triton.jit
def gan_f(s):
    return -softplus(-s)


@triton.jit
def gan_df(s):
    return sigmoid(-s)


@triton.jit
def gan_psi(s, ref):
    return softplus(s)


@triton.jit
def gan_phi(s, ref):
    return sigmoid(s)


@triton.jit
def kl_f(s):
    return s


@triton.jit
def kl_df(s):
    return one


@triton.jit
def kl_psi(s, ref):
    return exp(s - one)


@triton.jit
def kl_phi(s, ref):
    return exp(s - one)


@triton.jit
def rkl_f(s):
    return -exp(-s)


@triton.jit
def rkl_df(s):
    return exp(-s)


@triton.jit
def rkl_psi(s, ref):
    return s - one


@triton.jit
def rkl_phi(s, ref):
    return one


@triton.jit
def h2_f(s):
    return one - exp(-s)


@triton.jit
def h2_df(s):
    return exp(-s)


@triton.jit
def h2_psi(s, ref):
    return exp(s) - one


@triton.jit
def h2_phi(s, ref):
    return exp(s)


@triton.jit
def x2_f(s):
    return s


@triton.jit
def x2_df(s):
    return one


@triton.jit
def x2_psi(s, ref):
    return quarter * s * s + s


@triton.jit
def x2_phi(s, ref):
    return half * s + one


@triton.jit
def w1_f(s):
    return s


@triton.jit
def w1_df(s):
    return one


@triton.jit
def w1_psi(s, ref):
    return s


@triton.jit
def w1_phi(s, ref):
    return one
