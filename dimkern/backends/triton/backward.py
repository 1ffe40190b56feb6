"""Backward of the mean loss: its gradients are made, the upstream factor and the inputs' dtypes are not yet in."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import kernels

_BLOCK = 2048


def apply_upstream(
    grad_c: Tensor,  # (N, L, K) float32; empty where it is not needed
    grad_h: Tensor,  # (N, P, K) float32, by scale * g; empty where it is not needed
    upstream: Tensor,  # 0-d
    scale: Tensor,  # 0-d
    c_dtype: torch.dtype,
    g_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradients by c and g, in one launch."""
    by_c, by_g = torch.empty_like(grad_c, dtype=c_dtype), torch.empty_like(grad_h, dtype=g_dtype)
    blocks = triton.cdiv(grad_c.numel(), _BLOCK) + triton.cdiv(grad_h.numel(), _BLOCK)
    with torch.cuda.device_of(upstream):
        kernels.apply_upstream[(blocks,)](
            grad_c, by_c, grad_c.numel(), grad_h, by_g, grad_h.numel(), upstream, scale, BLOCK=_BLOCK, num_warps=8
        )
    return by_c, by_g
