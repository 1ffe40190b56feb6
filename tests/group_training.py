"""Training over a group is training by one process: DDP, FSDP, features in chunks, the harness's steps."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from group_cases import ONE_OF_EACH_FAMILY, assert_same_direction_and_size, equal, share, unequal
from oracle import F64, items, loss_of, pair_scores
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dimkern
from dimkern.estimators import REGISTRY
from dimkern.train.config import TrainConfig
from dimkern.train.data import Images
from dimkern.train.loop import make_model
from dimkern.train.processes import Processes
from dimkern.train.steps import Steps


class Toy(nn.Module):
    """An encoder with a learnable temperature: images (N, 5) to (l, m, scale)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body, self.local, self.summary = nn.Linear(5, 12), nn.Linear(4, 7), nn.Linear(12, 7)
        self.log_scale = nn.Parameter(torch.tensor(-0.3))

    def forward(self, x):
        h = self.body(x).tanh()
        return self.local(h.view(-1, 3, 4)).mT, self.summary(h), self.log_scale.exp()


def case_ddp():
    """Real DDP: parameter gradients of encoder and scale, also accumulated under no_sync, equal one process's."""
    for estimator in REGISTRY:
        for counts in (equal(), unequal()):
            x = torch.randn(2, sum(counts), 5, dtype=F64, generator=torch.Generator().manual_seed(1))
            alone = Toy().double()
            for batch in x:  # two micro-batches
                l, m, scale = alone(batch)
                items(estimator, pair_scores(l, m[..., None], scale, None, F64), "official").mean().backward()
            for compiled in (False, estimator == "infonce"):
                model = DistributedDataParallel(Toy().double())
                forward = torch.compile(model, backend="aot_eager") if compiled else model
                for i, batch in enumerate(x):
                    with model.no_sync() if i == 0 else contextlib.nullcontext():
                        l, m, scale = forward(share(batch, counts))
                        loss_of(estimator, l, m, scale=scale, group=dist.group.WORLD).backward()
                for (name, p), q in zip(model.module.named_parameters(), alone.parameters(), strict=True):
                    assert_same_direction_and_size(f"{estimator}: gradient of {name}", p.grad, q.grad)


def case_fsdp():
    """Parameters sharded over the processes, one of them a scale: gradients equal one process's."""

    class Sharded(Toy):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(self.log_scale.detach()[None])  # FSDP shards no 0-d parameter

        def forward(self, x):
            l, m, scale = super().forward(x)
            return l.contiguous(), m, scale.sum()

    for estimator in ONE_OF_EACH_FAMILY:
        x = torch.randn(sum(unequal()), 5, dtype=F64, generator=torch.Generator().manual_seed(1))
        alone, sharded = Sharded().double(), Sharded().double()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        for model, images, group in ((alone, x, None), (sharded, share(x, unequal()), dist.group.WORLD)):
            l, m, scale = model(images)
            loss_of(estimator, l, m, scale=scale, group=group).backward()
        for (name, p), q in zip(sharded.named_parameters(), alone.parameters(), strict=True):
            assert_same_direction_and_size(f"{estimator}: gradient of {name}", p.grad.full_tensor(), q.grad)


def case_encoder_in_chunks():
    """Features made in chunks without a graph, then chunk by chunk again with one, under DDP."""
    counts = equal(4)
    x = torch.randn(sum(counts), 5, dtype=F64, generator=torch.Generator().manual_seed(2))
    alone = Toy().double()
    l, m, scale = alone(x)
    items("infonce", pair_scores(l, m[..., None], scale, None, F64), "official").mean().backward()
    model = DistributedDataParallel(Toy().double())
    chunks = share(x, counts).split(2)
    with torch.no_grad():
        l, m, scale = (torch.cat(y) if y[0].ndim else y[0] for y in zip(*map(model.module, chunks), strict=True))
    l, m, scale = (y.requires_grad_() for y in (l, m, scale))
    dimkern.infonce_loss(l, m, scale=scale, group=dist.group.WORLD).backward()
    for i, chunk in enumerate(chunks):
        with model.no_sync() if i + 1 < len(chunks) else contextlib.nullcontext():
            made = model(chunk)
            torch.autograd.backward(made, [*(y.grad[2 * i : 2 * i + 2] for y in (l, m)), scale.grad / len(chunks)])
    for (name, p), q in zip(model.module.named_parameters(), alone.parameters(), strict=True):
        assert_same_direction_and_size(f"gradient of {name}", p.grad, q.grad)


def case_training_steps():
    """The harness's losses, step by step, are one process's on the whole batch, in chunks and with a prior too."""
    processes = Processes(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    each = 4 * dist.get_world_size()
    base = {"objective": "both", "width": 4, "fc": 16, "units": 8, "lr": 1e-2}
    for changes, tolerance in (
        ({"batch_size": each}, 1e-9),
        ({"batch_size": each + 1, "estimator": "jsd", "objective": "local"}, 1e-9),
        ({"batch_size": 2 * each, "chunk": 4}, 1e-9),
        ({"batch_size": each, "critic": "concat", "estimator": "dv"}, 1e-9),
        ({"batch_size": each + 1, "gamma": 0.1}, 1e-5),  # the prior is float32 by design
        ({"batch_size": each, "gamma": 0.1, "prior_updates": "one-step", "prior": "gaussian"}, 1e-5),
    ):
        config = TrainConfig(**{**base, **changes})
        histories = []
        for several in (Processes(), processes):
            torch.manual_seed(0)
            images = torch.randint(0, 256, (8, config.batch_size, 1, 8, 8)).double() / 128 - 1
            made = make_model(config, Images("noise", torch.zeros(1, 1, 8, 8), None, None, None)).double()
            steps = Steps(made, config, torch.device("cpu"), several)
            steps.objective.double()
            histories.append([steps.step(several.share(batch)) for batch in images])
        for i, (one, shared) in enumerate(zip(*histories, strict=True)):
            for name, value in one.items():
                assert abs(shared[name] / value - 1) < tolerance, (changes, i, name, shared[name], value)
