"""Bad input gets one clear error here, naming the argument, what it was and what is accepted."""

from __future__ import annotations

import math
from functools import lru_cache
from numbers import Real

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
    peek_interpreter_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from .estimators import REGISTRY
from .plan import score_dtype_of

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def as_locals(l: Tensor) -> Tensor:
    """Local features (N, K, L) or (N, K, H, W) as a view (N, L, K), or (N, H, W, K) where H and W do not merge."""
    _check_tensor("l", l, "(N, K, L) or (N, K, H, W)", (3, 4))
    if l.ndim == 3:
        return l.transpose(1, 2)
    c = l.permute(0, 2, 3, 1)
    merges = l.shape[2] == 1 or l.shape[3] == 1 or l.stride(2) == l.shape[3] * l.stride(3)
    return c.flatten(1, 2) if merges else c


def as_summaries(m: Tensor) -> Tensor:
    """Summary vectors (N, K), (N, K, P) or (N, K, 1, 1) as (N, P, K), a view."""
    accepted = "(N, K), (N, K, P) or (N, K, 1, 1)"
    _check_tensor("m", m, accepted, (2, 3, 4))
    if m.ndim == 4 and m.shape[2:] != (1, 1):
        raise ValueError(f"m is {tuple(m.shape)}; accepted are {accepted}")
    if m.ndim == 2:
        return m.unsqueeze(1)
    return (m if m.ndim == 3 else m.flatten(2)).transpose(1, 2)


def check_pair(
    l: Tensor, m: Tensor, c: Tensor, g: Tensor, channels: tuple[int, int] | None, least_images: int = 2
) -> None:
    """The two inputs belong together, have negatives, and have the channels that the critic takes."""
    _check_same("N", l, m, c.shape[0], g.shape[0])
    if channels is None:
        _check_same("K", l, m, c.shape[-1], g.shape[-1])
    else:
        for name, x, of_x, accepted in (("l", l, c.shape[-1], channels[0]), ("m", m, g.shape[-1], channels[1])):
            if of_x != accepted:
                raise ValueError(f"{name} is {tuple(x.shape)} with {of_x} channels; the critic takes {accepted}")
    if c.shape[0] < least_images:
        raise ValueError(
            f"l is {tuple(l.shape)} with N=1: a loss needs at least two images, the negatives come from the others"
        )
    if l.device != m.device:
        raise ValueError(f"l and m are on different devices: l on {l.device}, m on {m.device}")


def _check_same(letter: str, l: Tensor, m: Tensor, of_l: int, of_m: int) -> None:
    if of_l != of_m:
        raise ValueError(
            f"l and m disagree on {letter}: l is {tuple(l.shape)} with {letter}={of_l}, "
            f"m is {tuple(m.shape)} with {letter}={of_m}"
        )


def check_scale(scale: float | Tensor | None, c: Tensor, g: Tensor) -> Tensor:
    """`scale` as a 0-d tensor beside the inputs."""
    if not isinstance(scale, Tensor):
        if scale is None:
            scale = 1.0
        elif isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"scale is a {type(scale).__name__}; accepted are a number or a 0-d tensor")
        dtype = score_dtype_of(c.dtype, g.dtype)
        if c.is_cpu and not is_watched():
            return _constant(float(scale), dtype)
        return torch.full((), float(scale), dtype=dtype, device=c.device)
    if scale.ndim != 0:
        raise ValueError(f"scale is a tensor of shape {tuple(scale.shape)}; accepted are a number or a 0-d tensor")
    if not scale.is_floating_point():
        raise TypeError(f"scale is a tensor of {scale.dtype}; accepted are floating-point tensors")
    if scale.device != c.device:
        raise ValueError(f"scale is on {scale.device}, l and m are on {c.device}")
    return scale


@lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor, made once: making it is a tenth of a small batch's loss."""
    with torch.inference_mode(False):  # whose tensors no backward may use
        return torch.full((), value, dtype=dtype, device="cpu")


def check_clip(clip: float | None) -> float | None:
    if clip is None:
        return None
    if isinstance(clip, bool) or not isinstance(clip, Real):
        raise TypeError(f"clip is a {type(clip).__name__}; accepted are None or a positive number")
    if not (clip > 0 and math.isfinite(clip)):
        raise ValueError(f"clip is {clip}; accepted are None or a positive finite number")
    return float(clip)


def check_count(name: str, count: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} is a {type(count).__name__}; accepted is a positive int")
    if count < 1:
        raise ValueError(f"{name} is {count}; accepted is a positive int")
    return count


def check_generator(generator: torch.Generator | None, negatives: str) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; accepted are None or a torch.Generator")
    if negatives != "permute":
        raise ValueError(f"generator is given, and negatives is {negatives!r}, where nothing is drawn; see 'permute'")


def is_watched(*tensors: Tensor) -> bool:
    """Whether anything but autograd and autocast acts on what is called now, or on these tensors, or profiles it.

    Observers that watch from another thread, or record every operator of the process, are not known of.
    """
    if (
        is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _get_tracing_state()
        or peek_interpreter_stack() is not None
        or _profiler_enabled()
    ):
        return True
    return any(type(x) not in (Tensor, Parameter) or x.is_meta or _is_stand_in(x) for x in tensors)


def _is_stand_in(x: Tensor) -> bool:
    """Whether x's memory does not hold its numbers as they are, and the dispatcher would see to that."""
    return x.is_neg() or x._is_zerotensor() or torch._is_functional_tensor(x)


def refuse_transforms(*inputs: Tensor) -> None:
    """Forward mode, and torch.func's reverse mode, which the ops have no derivative for."""
    if is_compiling():
        return
    refuse_tangents(*inputs)
    if peek_interpreter_stack() is not None and torch.is_grad_enabled() and any(map(_is_differentiated, inputs)):
        raise RuntimeError(
            "dimkern's losses cannot be differentiated by torch.func: use torch.autograd.grad or backward(), or "
            "backend='reference'"
        )


def refuse_tangents(*inputs: Tensor) -> None:
    """Without this a forward-mode derivative of the ops would silently be 0."""
    if forward_ad._current_level < 0:
        return
    unpack = forward_ad.unpack_dual
    if any(unpack(x).tangent is not None for x in inputs):  # type: ignore[no-untyped-call]
        raise RuntimeError("dimkern's losses have no forward-mode derivative; use backend='reference' for that")


def _is_differentiated(x: Tensor) -> bool:
    """Whether torch.func's reverse mode follows x, at whatever depth of transforms."""
    while is_functorch_wrapped_tensor(x):
        if is_gradtrackingtensor(x) and x.requires_grad:  # what is made within a transform is wrapped, too
            return True
        x = get_unwrapped(x)
    return False


def check_choice(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted are {', '.join(map(repr, accepted))}")


def check_measure(measure: str) -> str:
    """The estimator that a measure of `fenchel_dual_loss` names, in either case."""
    name = measure.lower() if isinstance(measure, str) else ""
    if name not in REGISTRY or REGISTRY[name].family == "row_lse":
        measures = tuple(name.upper() for name, row in REGISTRY.items() if row.family != "row_lse")
        check_choice("measure", measure, measures)
    return name


def check_reduction(estimator: str, reduction: str) -> None:
    """InfoNCE is a mean over pairs, a divergence over summaries; DV's one logarithm joins all negatives."""
    accepted = {"row_lse": ("mean", "sum", "none"), "pointwise": ("mean", "none"), "global_lse": ("mean",)}
    check_choice("reduction", reduction, accepted[REGISTRY[estimator].family])


def _check_tensor(name: str, x: Tensor, accepted: str, ranks: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; accepted is a tensor {accepted}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} is {x.layout}; accepted are strided tensors")
    if x.ndim not in ranks:
        raise ValueError(f"{name} is {tuple(x.shape)}; accepted are {accepted}")
    if x.numel() == 0:
        raise ValueError(f"{name} is {tuple(x.shape)}, which is empty; accepted are {accepted}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} is {x.dtype}; accepted are {', '.join(map(str, _DTYPES))}")
