"""One optimisation step: encode, score, go back.

In one piece, or chunk by chunk with the gradients of the embeddings cached (Gao et al. 2021).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import TrainConfig
from .encoder import DeepInfoMax
from .objective import Objective
from .prior import PriorMatching
from .processes import Processes, share_batch_norm


class Steps:
    """One step after another: model, objective, prior, their optimisers, and mixed precision where it is on.

    Of several processes each steps with its share of the batch, and all arrive at the same weights.
    """

    def __init__(
        self, model: DeepInfoMax, config: TrainConfig, device: torch.device, processes: Processes | None = None
    ) -> None:
        self.config, self.model, self.processes = config, model, processes or Processes()
        self.encode: nn.Module = model
        if self.processes.group is not None:
            if not model.norm_batch:
                share_batch_norm(model, self.processes.group)
            self.encode = DistributedDataParallel(model, process_group=self.processes.group)
        self.noise = torch.Generator().manual_seed(config.seed)  # of the prior, and of permuted negatives
        self.objective = Objective(config, model.encoder, self.noise, self.processes.group).to(device)
        self.adam = torch.optim.Adam([*model.parameters(), *self.objective.parameters()], config.lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        low = torch.float16 if config.amp == "float16" else torch.bfloat16
        self.autocast = torch.autocast(device.type, low, enabled=config.amp != "off")
        self.prior: PriorMatching | None = None
        if config.gamma > 0:
            self.prior = PriorMatching(model.encoder.summary_features, config.prior, config.penalty).to(device)
            self.prior_adam = torch.optim.Adam(self.prior.parameters(), config.lr)

    def step(self, images: Tensor) -> dict[str, float]:
        """Train on (n, C, H, W) floats, this process's share; the loss, MI estimate and the prior's losses before it.

        All are of the whole batch and in nats.
        """
        self.model.train()
        self.adam.zero_grad(set_to_none=True)
        chunked = 0 < self.config.chunk < len(images)
        with self.autocast:
            pairs = self.embed(images) if chunked else self.encode(images)
            loss, mi = self.objective(pairs)
        said = {"loss": loss.detach(), "mi": mi}
        if self.prior is not None:
            told, fooled = self.match(self.prior, pairs["code"])
            loss = loss + self.config.gamma * fooled
            said |= {"discriminator": self.processes.mean(told), "prior": self.processes.mean(fooled)}
            said["loss"] = said["loss"] + self.config.gamma * said["prior"]
        self.scaler.scale(loss).backward()
        if chunked:
            self.push(images, pairs)
        self.processes.average_gradients(self.objective.parameters())  # those of critics, which DDP does not know
        self.scaler.step(self.adam)
        self.scaler.update()
        return {name: value.item() for name, value in said.items()}

    def match(self, prior: PriorMatching, y: Tensor) -> tuple[Tensor, Tensor]:
        """Train the discriminator on the codes `y` (N, F); its loss and the encoder's.

        "alternating": the encoder meets the discriminator after its step; "one-step": the one before.
        """
        # a share's mean, by the share's size: the mean over processes is then that over the batch
        total = self.config.batch_size if self.processes.group is not None else len(y)
        size = len(y) * self.processes.world / total
        before = prior.encoder_loss(y) * size if self.config.prior_updates == "one-step" else None
        self.prior_adam.zero_grad(set_to_none=True)
        drawn = prior.draw(y.new_empty(total, y.shape[1]), self.noise)
        loss = prior.discriminator_loss(y, self.processes.share(drawn)) * size
        loss.backward()  # type: ignore[no-untyped-call]
        self.processes.average_gradients(prior.parameters())
        self.prior_adam.step()
        return loss.detach(), prior.encoder_loss(y) * size if before is None else before

    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """First pass of a chunked step: what the model gives, as leaves that collect the loss's gradients."""
        with torch.no_grad():
            seen = [self.model(chunk) for chunk in torch.split(images, self.config.chunk)]
        return {name: torch.cat([one[name] for one in seen]).requires_grad_() for name in seen[0]}

    def push(self, images: Tensor, leaves: dict[str, Tensor]) -> None:
        """Second pass (Gao et al. 2021): every chunk once more, its share of the leaves' gradients into the weights.

        Exact, as chunks hold whole batch-norm groups (`--norm-batch`) and nothing in the model draws at random.
        """
        kept = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        size = self.config.chunk
        chunks = torch.split(images, size)
        for i, chunk in enumerate(chunks):
            with self.apart(until=i + 1 == len(chunks)), self.autocast:
                seen = self.encode(chunk)
            used = [name for name, leaf in leaves.items() if leaf.grad is not None]
            grads = [leaves[name].grad[i * size : i * size + size] for name in used]  # type: ignore[index]
            torch.autograd.backward([seen[name] for name in used], grads)
        for name, buffer in self.model.named_buffers():  # the statistics have seen these images already
            buffer.copy_(kept[name])

    def apart(self, until: bool) -> AbstractContextManager[None]:
        """Gradients stay in this process `until` they are averaged with the others'."""
        if until or not isinstance(self.encode, DistributedDataParallel):
            return nullcontext()
        return self.encode.no_sync()

    def parts(self) -> dict[str, Any]:
        """Everything with a state, by name."""
        named = {"model": self.model, "objective": self.objective, "adam": self.adam, "scaler": self.scaler}
        return named | ({} if self.prior is None else {"prior": self.prior, "prior_adam": self.prior_adam})

    def finite(self) -> bool:
        modules = [part for part in self.parts().values() if isinstance(part, nn.Module)]
        return all(bool(torch.isfinite(weight).all()) for module in modules for weight in module.parameters())

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts().items()} | {"noise": self.noise.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.noise.set_state(state["noise"])
