"""The one LightningModule: it trains anything that has `losses()`, all seeds at once, many gradient steps per call."""

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol, runtime_checkable

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from offrl_models.datasets.transitions import Sampler, TransitionBatch, Transitions
from offrl_models.schema import InputError

Report = Callable[[int, dict[str, float]], None]  # gradient steps so far, mean loss of each network


@runtime_checkable
class Trainable(Protocol):
    """What the learner needs of an algorithm."""

    targets: ClassVar[dict[str, str]]  # slow copy -> fast network
    draws: int  # random draws per row that `losses` wants
    target_update: tuple[float, int]  # (how far the slow copy moves, every how many gradient steps)

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]: ...

    def learning_rates(self) -> dict[str, float]: ...


class NonFiniteLossError(InputError):
    """A loss became NaN or infinite; nothing was kept of the chunk in which it did."""


class _Chunks(IterableDataset[int]):
    """The number of gradient steps of each chunk."""

    def __init__(self, gradient_steps: int, chunk: int):
        self.sizes = [min(chunk, gradient_steps - start) for start in range(0, gradient_steps, chunk)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.sizes)


class FusedAdam(torch.optim.Optimizer):
    """Adam in one call per network, that of `torch.optim.Adam(fused=True)`.

    What that class prepares anew at each step, a tenth of a millisecond where caches are cold, is prepared once. A network
    without gradients is left as it is: an algorithm need not train each network at each step.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, {"betas": (0.9, 0.999), "eps": 1e-8})
        self.work = [self._work(group) for group in self.param_groups]

    def _work(self, group: dict[str, Any]) -> tuple[list[Tensor], Tensor, Callable[[list[Tensor]], None]]:
        """The parameters, the count of steps, and what to do with the gradients."""
        parameters = [each for each in group["params"] if each.numel()]  # an empty one gets no gradient
        step = torch.zeros((), device=parameters[0].device)
        mean, square = ([torch.zeros_like(each) for each in parameters] for _ in range(2))
        (beta1, beta2), steps = group["betas"], [step] * len(parameters)
        settings = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        none = {"weight_decay": 0.0, "amsgrad": False, "maximize": False}

        def update(gradients: list[Tensor]) -> None:
            torch._fused_adam_(parameters, gradients, mean, square, [], steps, **settings, **none)  # pyright: ignore

        return parameters, step, update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for parameters, step, update in self.work:
            if parameters[0].grad is not None:
                step += 1
                update([each.grad for each in parameters])  # pyright: ignore[reportArgumentType]
                for each in parameters:
                    each.grad = None


class Learner(L.LightningModule):
    """Sums the losses of all seeds, steps one Adam with a parameter group per network, and moves the targets.

    The sum of independent losses gives every seed the gradient it would have alone.
    """

    def __init__(self, algorithm: nn.Module, transitions: Transitions, sampler: Sampler, report: Report | None = None):
        super().__init__()
        self.automatic_optimization = False
        self.algorithm: Any = algorithm
        self.transitions, self.sampler, self.report = transitions, sampler, report
        self.gradient_steps = 0
        self.history: list[dict[str, Any]] = []
        self.slow: list[Tensor] = []
        self.fast: list[Tensor] = []
        for slow, fast in self.algorithm.targets.items():
            target, source = getattr(self.algorithm, slow), getattr(self.algorithm, fast)
            target.load_state_dict(source.state_dict())
            target.requires_grad_(False)
            self.slow += target.parameters()
            self.fast += source.parameters()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": list(getattr(self.algorithm, name).parameters()), "lr": rate, "name": name}
            for name, rate in self.algorithm.learning_rates().items()
        ]
        return FusedAdam(groups)

    def training_step(self, batch: int, batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        found: dict[str, list[Tensor]] = {}
        for transitions in self.transitions.batches(self.sampler, batch):
            losses = self.algorithm.losses(transitions._replace(step=self.gradient_steps))
            self.manual_backward(torch.cat(list(losses.values())).sum())
            optimizer.step()
            self.gradient_steps += 1
            self.move_targets()
            for name, loss in losses.items():
                found.setdefault(name, []).append(loss.detach())
        per_seed = {name: torch.stack(each).mean(0).tolist() for name, each in found.items()}
        for name, values in per_seed.items():
            bad = [i for i, value in enumerate(values) if value != value or abs(value) == float("inf")]
            if bad:
                raise NonFiniteLossError(
                    f"the {name} loss of seed {bad[0]} is not finite after {self.gradient_steps} gradient steps; "
                    "lower its learning rate or look for extreme values in the observations and rewards."
                )
        self.history.append({"gradient_steps": self.gradient_steps, **per_seed})
        if self.report:
            self.report(self.gradient_steps, {name: sum(v) / len(v) for name, v in per_seed.items()})

    @torch.no_grad()
    def move_targets(self) -> None:
        """Bring the slow networks nearer to the fast ones, where it is time to."""
        rate, interval = self.algorithm.target_update
        if self.slow and self.gradient_steps % interval == 0:
            torch._foreach_lerp_(self.slow, self.fast, rate)  # pyright: ignore[reportPrivateImportUsage]


def train(
    algorithm: nn.Module,
    transitions: Transitions,
    sampler: Sampler,
    *,
    gradient_steps: int,
    chunk: int = 100,
    report: Report | None = None,
) -> list[dict[str, Any]]:
    """Train in place for a number of gradient steps. Returns the mean losses per chunk, network and seed.

    Raises NonFiniteLossError naming network, seed and step.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    learner = Learner(algorithm, transitions, sampler, report)
    with warnings.catch_warnings():
        # The loader yields numbers, not data; workers would only slow it down.
        warnings.filterwarnings("ignore", ".*does not have many workers.*", UserWarning)
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # lightning 2.6 against torch 2.13
        trainer = L.Trainer(
            max_epochs=1,
            accelerator=transitions.reward.device.type,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # Adam's means of gradients that stay 0 fade into denormal numbers, which processors are slow at.
        torch.set_flush_denormal(True)
        try:
            trainer.fit(learner, DataLoader(_Chunks(gradient_steps, chunk), batch_size=None))
        finally:
            torch.set_flush_denormal(False)
    return learner.history
