"""Several processes that train one model, as torchrun starts them; one process alone is the same with nothing to do.

Every process has the same weights and the same random numbers, encodes its share of each batch, and averages its
gradients with the others' (DistributedDataParallel). Losses, and batch-norm statistics, are those of the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import SettingError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this is."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """This is the process that prints and writes."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This process's images of a batch (N, ...); the shares, one after another, are the batch."""
        return batch.tensor_split(self.world)[self.rank]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes of a detached tensor."""
        if self.group is None:
            return value.detach()
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total / self.world

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        if self.group is not None:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.copy_(self.mean(parameter.grad))

    def once(self, action: Callable[[], T]) -> T | None:
        """What the first process alone does; a setting that it refuses is refused by all."""
        if self.group is None:
            return action()
        result, refused = None, [None]
        if self.first:
            try:
                result = action()
            except SettingError as error:
                refused = [(error.setting, error.why)]  # type: ignore[list-item]
        dist.broadcast_object_list(refused, group=self.group, group_src=0)
        if refused[0] is not None:
            raise SettingError(*refused[0])
        return result


def count() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, as a group for as long as the context lasts; else this one alone.

    `device` as in TrainConfig: on "cuda", or "auto" where there is one, each process of a machine takes its own.
    """
    if count() == 1:
        yield Processes()
        return
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise SettingError(
                "device", f"process {local} of this machine has no GPU: {torch.cuda.device_count()} here"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    try:
        yield Processes(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class BatchNormOver(_BatchNorm):
    """Batch normalisation with the statistics of all processes' images; torch's SyncBatchNorm has no CPU kernels."""

    def __init__(self, like: _BatchNorm, group: dist.ProcessGroup) -> None:
        super().__init__(like.num_features, like.eps, like.momentum, like.affine, like.track_running_stats)
        self.group = group
        self.weight, self.bias = like.weight, like.bias
        self.running_mean, self.running_var = like.running_mean, like.running_var
        self.num_batches_tracked = like.num_batches_tracked

    def forward(self, input: Tensor) -> Tensor:
        """(n, C, ...), this process's images."""
        if not self.training:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32)).movedim(1, -1)  # (n, ..., C)
        rows = x.reshape(-1, x.shape[-1])
        # the count beside the sums: processes may have shares of different sizes
        sums = _Sum.apply(torch.cat([rows.sum(0), rows.new_full((1,), len(rows))]), self.group)  # type: ignore[no-untyped-call]
        count = sums[-1].detach()
        mean = sums[:-1] / count
        squares = (rows - mean).square().sum(0)
        variance = _Sum.apply(squares, self.group) / count  # type: ignore[no-untyped-call]
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        y = (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        out: Tensor = y.movedim(-1, 1).to(input.dtype)
        return out

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def share_batch_norm(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """`model` itself, its batch norms counting all processes' images; the state's names stay."""
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            setattr(model, name, BatchNormOver(child, group))
        else:
            share_batch_norm(child, group)
    return model
