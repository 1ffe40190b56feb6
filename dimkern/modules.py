"""nn.Module forms of the losses: the same arguments, kept; `forward(l, m)`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .functional import LossParts, donsker_varadhan_loss, fenchel_dual_loss, infonce_loss


class _PairLoss(nn.Module):
    """Keeps the keyword arguments of a loss; a `scale` that is a Parameter is registered and trained."""

    def __init__(
        self,
        *,
        scale: float | Tensor | None = None,
        clip: float | None = None,
        reduction: str = "mean",
        backend: str = "auto",
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(scale, Tensor) and not isinstance(scale, nn.Parameter):
            self.register_buffer("scale", scale)
        else:
            self.scale = scale
        self.clip, self.reduction, self.backend, self.return_parts = clip, reduction, backend, return_parts

    def _keywords(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("scale", "clip", "reduction", "backend", "return_parts")}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._keywords().items() if name != "scale")


class InfoNCELoss(_PairLoss):
    """`infonce_loss` as a module."""

    def __init__(self, *, self_mask: str = "official", **keywords: Any) -> None:
        super().__init__(**keywords)
        self.self_mask = self_mask

    def forward(self, l: Tensor, m: Tensor) -> Tensor | LossParts:
        return infonce_loss(l, m, self_mask=self.self_mask, **self._keywords())


class FenchelDualLoss(_PairLoss):
    """`fenchel_dual_loss` as a module."""

    def __init__(self, measure: str = "JSD", **keywords: Any) -> None:
        super().__init__(**keywords)
        self.measure = measure

    def forward(self, l: Tensor, m: Tensor) -> Tensor | LossParts:
        return fenchel_dual_loss(l, m, self.measure, **self._keywords())


class DonskerVaradhanLoss(_PairLoss):
    """`donsker_varadhan_loss` as a module."""

    def forward(self, l: Tensor, m: Tensor) -> Tensor | LossParts:
        return donsker_varadhan_loss(l, m, **self._keywords())
