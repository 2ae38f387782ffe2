"""Adam for networks with a leading seed axis: one call per network, gradients clipped per seed, a schedule of the rate."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Schedule = Literal["constant", "cosine"]


def rate_factor(step: int, *, gradient_steps: int, schedule: Schedule, warmup_steps: int) -> float:
    """What the learning rate is multiplied with at a step: it rises in a line while warming up, then stays or falls to 0 by a
    half cosine. Loshchilov & Hutter (2017), https://arxiv.org/abs/1608.03983, eq. 5, without restarts."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    share = (step - warmup_steps) / max(gradient_steps - warmup_steps, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))


class FusedAdam(torch.optim.Optimizer):
    """Adam in one call per network, that of `torch.optim.Adam(fused=True)`; with `weight_decay`, that of `AdamW`: Loshchilov &
    Hutter (2019), https://arxiv.org/abs/1711.05101, algorithm 2.

    What that class prepares anew at each step, a tenth of a millisecond where caches are cold, is prepared once. A network
    without gradients is left as it is: an algorithm need not train each network at each step.
    """

    def __init__(self, groups: list[dict[str, Any]], seeds: int = 1, clip_norm: float | None = None):
        super().__init__(groups, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
        self.seeds, self.clip_norm, self.factor = seeds, clip_norm, 1.0
        self.work = [_Network(group) for group in self.param_groups]

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.advance()

    @torch.no_grad()
    def advance(self) -> None:
        """One step, without what torch puts around `step` for hooks and profilers, which a small network feels."""
        for network in self.work:
            if network.parameters[0].grad is not None:
                # The kernel pairs numbers by their places in memory, and never looks at strides.
                gradients = [each.grad.contiguous() for each in network.parameters]  # pyright: ignore[reportOptionalMemberAccess]
                if self.clip_norm is not None:
                    clip_per_seed(gradients, self.seeds, self.clip_norm)
                network.update(gradients, self.factor)
                for each in network.parameters:
                    each.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, beside the parameters."""
        return {f"{network.name}.{name}": each for network in self.work for name, each in network.tensors().items()}


class _Network:
    """The parameters of one network, and what Adam remembers of their gradients."""

    def __init__(self, group: dict[str, Any]):
        self.name, self.rate = group["name"], group["lr"]
        self.parameters: list[Tensor] = [
            each for each in group["params"] if each.numel()
        ]  # an empty one gets no gradient
        self.mean, self.square = ([torch.zeros_like(each) for each in self.parameters] for _ in range(2))
        self.steps = torch.zeros((), device=self.parameters[0].device)
        self.counts = [self.steps] * len(self.parameters)
        (beta1, beta2), none = group["betas"], {"amsgrad": False, "maximize": False}
        self.settings = {
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            **none,
        }

    def update(self, gradients: list[Tensor], factor: float) -> None:
        self.steps += 1
        adam: Any = torch._fused_adamw_  # pyright: ignore[reportPrivateImportUsage]
        rate = self.rate * factor
        adam(self.parameters, gradients, self.mean, self.square, [], self.counts, lr=rate, **self.settings)

    def tensors(self) -> dict[str, Tensor]:
        named = {f"{kind}.{i}": each for kind in ("mean", "square") for i, each in enumerate(getattr(self, kind))}
        return {**named, "steps": self.steps}


def clip_per_seed(gradients: list[Float[Tensor, "rows ..."]], seeds: int, norm: float) -> None:
    """Scale the gradients of each seed, in place, so that together they are no longer than `norm`."""
    squares = torch.stack([each.reshape(seeds, -1).square().sum(1) for each in gradients]).sum(0)
    scale = (norm / squares.sqrt().clamp(min=1e-12)).clamp(max=1.0)
    for each in gradients:
        each.view(seeds, -1).mul_(scale[:, None])
