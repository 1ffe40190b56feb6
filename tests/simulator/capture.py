"""What makes the host wait for a GPU, which no CUDA graph can capture: it raises where torch is asked for it."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dimkern import ops

# reading a number, and results whose sizes are data
_WAITS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "bincount",
    "unique_dim",
    "_unique2",
}
_OURS = {"mean_loss": ops._mean_loss, "scores": ops._scores, "scores_backward": ops._sweep}


class NothingWaits(TorchDispatchMode):
    """Inside, an op that waits raises; the losses' own ops are entered, and `names` says which others ran.

    Tensors are the CPU's here, so that a copy to the host is seen by its argument alone, and a number that is read may
    be one that a GPU's run has on the host too: the memory budget, the only int64 one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func._schema.name.split("::")
        kwargs = kwargs or {}
        if space == "dimkern":
            with self:
                return _OURS[name](*args, **kwargs)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        on_host = name == "_local_scalar_dense" and args[0].dtype == torch.int64
        by_mask = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        moved = name == "_to_copy" and kwargs.get("device") is not None
        if (name in _WAITS and not on_host) or by_mask or moved:
            raise RuntimeError(f"{func} makes the host wait")
        self.names.append(f"{space}::{name}")
        return func(*args, **kwargs)
