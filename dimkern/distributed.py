"""Collectives over a torch.distributed process group, and what its processes agree on before the first one.

Owns all communication: the exchange of terms that opens a call, the gathering of summaries, the joining of row
statistics, the scattering of their gradient, and how an error reaches every process. Knows nothing of losses.

Two rules keep a group from hanging. Which collectives a call makes depends on the exchanged terms alone, never on what
one process has or needs. And a process that fails between two of them makes the others all the same, with zeros
(`Collectives.replay`), before `settle` tells the group, where every process raises.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Term = str | int | float | None

MESSAGE_BYTES = 256  # of one process in an exchange
_REFUSED = "!"  # opens the message of a process that cannot take part; no JSON begins so


class GroupError(RuntimeError):
    """Another process of the group failed, or its processes called a loss with inputs that do not go together."""


def members(group: object) -> dist.ProcessGroup | None:
    """The process group, or None where a process is alone: no group, or a group of one.

    Raises:
        ValueError: a group that this process is not in.
        TypeError: no process group.
    """
    if group is None:
        return None
    if not isinstance(group, dist.ProcessGroup):
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"group is one that this process, rank {dist.get_rank()}, is not in")
        raise TypeError(
            f"group is a {type(group).__name__}; accepted are None, for this process alone, or a "
            "torch.distributed.ProcessGroup such as torch.distributed.group.WORLD"
        )
    return group if dist.get_world_size(group) > 1 else None


def exchange(group: dist.ProcessGroup, terms: list[Term] | Exception) -> list[list[Term]]:
    """The terms of every process, by rank; an exception says that this one cannot take part.

    Raises:
        GroupError: another process said so (the message has its rank and its error).
    """
    refusal = f"{_REFUSED}{type(terms).__name__}: {terms}" if isinstance(terms, Exception) else None
    said = _all_texts(group, refusal or json.dumps(terms, separators=(",", ":")))
    refused = [(rank, text.removeprefix(_REFUSED)) for rank, text in enumerate(said) if text.startswith(_REFUSED)]
    if refused and refusal is None:
        raise GroupError("; ".join(f"rank {rank} of the group raised {error}" for rank, error in refused[:4]))
    return [] if refused else [json.loads(text) for text in said]


@contextmanager
def announcing(group: dist.ProcessGroup) -> Iterator[None]:
    """An error inside, before the processes exchange their terms, reaches those that wait for this one's."""
    try:
        yield
    except Exception as error:
        exchange(group, error)
        raise


def _all_texts(group: dist.ProcessGroup, text: str) -> list[str]:
    """The text of every process, cut to MESSAGE_BYTES."""
    # over the host's own backend where the group has one: an accelerator's would wait for all it has queued
    host = "cpu:" in str(dist.get_backend_config(group))
    device = torch.device("cpu") if host else torch.accelerator.current_accelerator()
    message = text.encode("ascii", "replace")[:MESSAGE_BYTES].ljust(MESSAGE_BYTES)
    mine = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(device)
    every = torch.empty(dist.get_world_size(group) * MESSAGE_BYTES, dtype=torch.uint8, device=device)
    _all_gather(every, mine, group=group)
    both = bytes(every.tolist())
    return [both[i : i + MESSAGE_BYTES].decode().rstrip() for i in range(0, len(both), MESSAGE_BYTES)]


def _all_gather(*arguments: Any, **options: Any) -> Any:
    newest = getattr(dist, "all_gather_single", None)  # its name from torch 2.13 on
    return (newest or dist.all_gather_into_tensor)(*arguments, **options)


def _reduce_scatter(*arguments: Any, **options: Any) -> Any:
    newest = getattr(dist, "reduce_scatter_single", None)
    return (newest or dist.reduce_scatter_tensor)(*arguments, **options)


@dataclass
class Arriving:
    """The gradient of this process's summaries, (n, P, K), while it is on its way."""

    work: Any
    sent: Tensor  # held until it has been read
    received: Tensor
    images: int

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.received[: self.images]


class Collectives:
    """The collectives of one call over tensors whose leading dimension is images, `counts` of them on each rank."""

    def __init__(self, group: dist.ProcessGroup, counts: list[int]) -> None:
        self.group, self.counts = group, counts
        self.rank, self._most = dist.get_rank(group), max(counts)
        self.first, self.N = sum(counts[: self.rank]), sum(counts)
        self._begun = self._made = self._to_skip = 0

    def total(self, sums: Tensor) -> Tensor:
        """Sum over processes, elementwise."""
        sums = sums.clone(memory_format=torch.contiguous_format)
        self._make(dist.all_reduce, sums)
        return sums

    def log_total(self, log_sums: Tensor) -> Tensor:
        """Log-sum-exp over processes, elementwise: their maximum, then the sum of what is relative to it."""
        highest = log_sums.clone(memory_format=torch.contiguous_format)
        self._make(dist.all_reduce, highest, op=dist.ReduceOp.MAX)
        # an empty (-inf) or overflown (+inf) entry takes any finite reference: inf - inf would be NaN
        reference = torch.where(highest.isinf(), 0.0, highest)
        return reference + self.total((log_sums - reference).exp()).log()

    def rows(self, statistic: Tensor, rows: slice) -> Tensor:
        """(rows, P) from the process that has each image; `statistic` is that of the images here."""
        every = statistic.new_zeros(rows.stop - rows.start, *statistic.shape[1:])
        first = max(rows.start, self.first) - rows.start
        every[first : first + len(statistic)] = statistic
        self._make(dist.all_reduce, every)
        return every

    def gather(self, x: Tensor) -> Tensor:
        """(n, P, K) of every process as (N, P, K), in x's own dtype; ranks with fewer images send padding."""
        n, P, K = x.shape
        mine = x.new_zeros(self._most, P, K) if n < self._most else x
        if n < self._most:
            mine[:n] = x
        every = torch.empty(len(self.counts), self._most, P, K, dtype=x.dtype, device=x.device)
        # as bytes, which every backend carries
        self._make(_all_gather, every.flatten(0, 1).view(torch.uint8), mine.contiguous().view(torch.uint8))
        if min(self.counts) == self._most:
            return every.flatten(0, 1)
        return torch.cat([of_rank[:count] for of_rank, count in zip(every, self.counts, strict=True)])

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `scatter` sends of x (N, P, K), and where it receives: made before, so that it cannot fail then."""
        received = x.new_empty(self._most, *x.shape[1:])
        if min(self.counts) == self._most:
            return x, received
        padded = x.new_zeros(len(self.counts), self._most, *x.shape[1:])
        for of_rank, part in zip(padded, torch.split(x, self.counts), strict=True):
            of_rank[: len(part)] = part
        return padded.flatten(0, 1), received

    def scatter(self, sent: Tensor, received: Tensor) -> Arriving:
        """The sum over processes of (N, P, K), each process's own images of it; does not wait."""
        work = self._make(_reduce_scatter, received, sent, async_op=True)
        return Arriving(work, sent, received, self.counts[self.rank])

    def replay(self, error: Exception) -> None:
        """After `error`: the collectives made already are left out from now on, the others are made.

        Raises:
            Exception: `error`, where it was a collective that failed.
        """
        if self._begun > self._made:
            raise error
        self._to_skip, self._begun, self._made = self._made, 0, 0

    def settle(self, error: Exception | None) -> None:
        """Every process comes here once its computing is done, or has failed with `error`.

        Raises:
            Exception: `error`.
            GroupError: another process failed.
        """
        exchange(self.group, error or [])
        if error is not None:
            raise error

    def _make(self, collective: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self._begun += 1
        work = None
        if self._begun > self._to_skip:
            work = collective(*arguments, group=self.group, **options)
        self._made += 1
        return work
