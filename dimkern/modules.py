"""nn.Module forms of the losses: the same arguments, kept; `forward(l, m)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .critics import PairMLPCritic, check_critic
from .distributed import members
from .functional import LossParts, donsker_varadhan_loss, fenchel_dual_loss, infonce_loss
from .one_negative import NEGATIVES
from .validate import check_choice, check_clip, check_generator, check_measure, check_reduction

if TYPE_CHECKING:  # a build of torch may lack it
    from torch.distributed import ProcessGroup

_KEYWORDS = ("scale", "clip", "reduction", "backend", "return_parts", "critic", "negatives", "generator", "group")


class _PairLoss(nn.Module):
    """Keeps the keyword arguments of a loss; a `critic`, or a `scale` that is a Parameter, is registered, trained."""

    def __init__(
        self,
        *,
        scale: float | Tensor | None = None,
        clip: float | None = None,
        reduction: str = "mean",
        backend: str = "auto",
        return_parts: bool = False,
        critic: PairMLPCritic | None = None,
        negatives: str = "all",
        generator: torch.Generator | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if isinstance(scale, Tensor) and scale.grad_fn is not None:
            raise ValueError("scale is the result of a computation; a module takes a Parameter, a tensor or a number")
        check_clip(clip)
        check_critic(critic)
        check_choice("negatives", negatives, NEGATIVES)
        check_generator(generator, negatives)
        if isinstance(scale, Tensor) and not isinstance(scale, nn.Parameter):
            self.register_buffer("scale", scale)
        else:
            self.scale = scale
        self.clip, self.reduction, self.backend, self.return_parts = clip, reduction, backend, return_parts
        self.critic, self.negatives, self.generator = critic, negatives, generator
        members(group)
        self.group = group

    def _keywords(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _KEYWORDS}

    def extra_repr(self) -> str:
        own = {name: getattr(self, name) for name in ("measure", "self_mask") if hasattr(self, name)}
        shown = {**own, **self._keywords()}
        return ", ".join(
            f"{name}={value!r}" for name, value in shown.items() if not isinstance(value, Tensor | nn.Module)
        )


class InfoNCELoss(_PairLoss):
    """`infonce_loss` as a module."""

    def __init__(self, *, self_mask: str = "official", **keywords: Any) -> None:
        super().__init__(**keywords)
        check_choice("self_mask", self_mask, ("official", "exclude"))
        check_reduction("infonce", self.reduction)
        self.self_mask = self_mask

    def forward(self, l: Tensor, m: Tensor) -> Tensor | LossParts:
        return infonce_loss(l, m, self_mask=self.self_mask, **self._keywords())


class FenchelDualLoss(_PairLoss):
    """`fenchel_dual_loss` as a module."""

    def __init__(self, measure: str = "JSD", **keywords: Any) -> None:
        super().__init__(**keywords)
        check_reduction(check_measure(measure), self.reduction)
        self.measure = measure

    def forward(self, l: Tensor, m: Tensor) -> Tensor | LossParts:
        return fenchel_dual_loss(l, m, self.measure, **self._keywords())


class DonskerVaradhanLoss(_PairLoss):
    """`donsker_varadhan_loss` as a module."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        check_reduction("dv", self.reduction)

    def forward(self, l: Tensor, m: Tensor) -> Tensor | LossParts:
        return donsker_varadhan_loss(l, m, **self._keywords())
