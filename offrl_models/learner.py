"""The one LightningModule: it trains anything that has `losses()`, all seeds at once, many gradient steps per call."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Protocol, runtime_checkable

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from offrl_models import parallel
from offrl_models.checkpoint import Checkpoint
from offrl_models.datasets.transitions import Sampler, TransitionBatch, Transitions
from offrl_models.early_stopping import Stopping
from offrl_models.gradients import compiled_losses, plain_losses
from offrl_models.optimizer import FusedAdam, rate_factor
from offrl_models.processor import ready_to_train
from offrl_models.schema import InputError
from offrl_models.training_config import TrainingConfig

Report = Callable[[int, dict[str, float]], None]  # gradient steps so far, mean loss of each network
Watch = Callable[[list[dict[str, Any]]], None]  # the history of losses so far

# How often slow networks are copied in a training whose algorithm does not say every how many steps: a published interval, such as
# d3rlpy's 8,000, is for millions of steps, and in a short training the targets would hardly ever move.
COPIES = 100


@runtime_checkable
class Trainable(Protocol):
    """What the learner needs of an algorithm."""

    targets: ClassVar[dict[str, str]]  # slow copy -> fast network
    draws: int  # random draws per row that `losses` wants
    target_update: tuple[float, int | None]  # (how far the slow copy moves, every how many steps; None: see COPIES)

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]: ...

    def learning_rates(self) -> dict[str, float]: ...


class NonFiniteLossError(InputError):
    """The losses of all seeds became NaN or infinite."""


class _Chunks(IterableDataset[int]):
    """The number of gradient steps of each chunk. A chunk ends where weights are kept, and the next one starts there."""

    def __init__(self, done: int, kept_after: list[int], chunk: int):
        starts = [0, *kept_after]
        ends = [end for a, b in pairwise(starts) for end in (*range(a + chunk, b, chunk), b)]
        self.sizes = [end - start for start, end in pairwise([0, *ends]) if start >= done]

    def __iter__(self) -> Iterator[int]:
        return iter(self.sizes)


class Learner(L.LightningModule):
    """Sums the losses of all seeds, steps one Adam with a parameter group per network, and moves the targets.

    The sum of independent losses gives every seed the gradient it would have alone. A seed whose loss is no number is stopped with
    the weights it had before, and the others go on.
    """

    def __init__(
        self,
        algorithm: nn.Module,
        transitions: Transitions,
        sampler: Sampler,
        config: TrainingConfig,
        report: Report | None = None,
        checkpoint: Checkpoint | None = None,
        stop: Stopping | None = None,
        watch: Watch | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.algorithm: Any = algorithm
        self.transitions, self.sampler, self.config = transitions, sampler, config
        self.report, self.checkpoint, self.stop, self.watch = report, checkpoint, stop, watch
        if config.processes > 1:
            parallel.require(config.processes)
            sampler.share = parallel.share(sampler.batch_size)
        self.gradient_steps = 0
        self.history: list[dict[str, Any]] = []
        self.stopped: dict[int, str] = {}  # seeds, by place, and why
        self.kept: dict[int, dict[str, Tensor]] = {}  # weights by gradient steps, but for the last ones
        self.slow: list[Tensor] = []
        self.fast: list[Tensor] = []
        for slow, fast in self.algorithm.targets.items():
            target, source = getattr(self.algorithm, slow), getattr(self.algorithm, fast)
            target.load_state_dict(source.state_dict())
            target.requires_grad_(False)
            self.slow += target.parameters()
            self.fast += source.parameters()
        self.adam = self._adam()
        trained = [each for network in self.adam.work for each in network.parameters]
        compiled = config.compile and compiled_losses(algorithm, trained, transitions.device)
        self.losses = compiled or plain_losses(algorithm)
        self.good = [each.detach().clone() for each in self.algorithm.parameters()]

    @property
    def seeds(self) -> int:
        return len(self.sampler.pools)

    def _adam(self) -> FusedAdam:
        decay = getattr(self.algorithm, "weight_decay", 0.0)
        groups = [
            {"params": [*getattr(self.algorithm, name).parameters()], "lr": rate, "name": name, "weight_decay": decay}
            for name, rate in self.algorithm.learning_rates().items()
        ]
        return FusedAdam(groups, self.seeds, self.config.clip_norm)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.adam

    def training_step(self, batch: int, batch_idx: int) -> None:
        found: dict[str, list[Tensor]] = {}
        for transitions in self.transitions.batches(self.sampler, batch):
            losses = self.losses(transitions._replace(step=self.gradient_steps))
            if self.config.processes > 1:
                losses = self._averaged(losses)
            self.adam.factor = rate_factor(
                self.gradient_steps,
                gradient_steps=self.config.gradient_steps,
                schedule=self.config.schedule,
                warmup_steps=self.config.warmup_steps,
            )
            self.adam.advance()
            self.gradient_steps += 1
            self.move_targets()
            for name, loss in losses.items():
                found.setdefault(name, []).append(loss.detach())
        per_seed = {name: torch.stack(each).mean(0).tolist() for name, each in found.items()}
        self._stop_seeds(per_seed)
        alive = [seed for seed in range(self.seeds) if seed not in self.stopped]
        if self.stop:
            per_seed |= self.stop.judge()
        # A network that no step of the chunk trained has no loss in it.
        told: dict[str, list[float | None]] = {name: [None] * self.seeds for name in self.algorithm.learning_rates()}
        for name, values in per_seed.items():
            told[name] = [v if i in alive and math.isfinite(v) else None for i, v in enumerate(values)]
        self.history.append({"gradient_steps": self.gradient_steps, **told})
        if self.watch:
            self.watch(self.history)
        if self.report:
            self.report(
                self.gradient_steps, {name: sum(v[i] for i in alive) / len(alive) for name, v in per_seed.items()}
            )
        if self.gradient_steps in self.config.kept_after[:-1]:
            weights = self.algorithm.named_parameters()
            self.kept[self.gradient_steps] = {name: each.detach().cpu().clone() for name, each in weights}
        if self.checkpoint and self.gradient_steps % self.checkpoint.every < batch:
            self.save(self.checkpoint)
        if self.stop and self.stop.done:
            self.trainer.should_stop = True

    @torch.no_grad()
    def _averaged(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give all networks the gradients of the whole batch, of which each process has computed its share. The losses of it."""
        trained = [each for network in self.adam.work for each in network.parameters if each.grad is not None]
        found = parallel.average([*(each.grad for each in trained if each.grad is not None), *losses.values()])
        for each, gradient in zip(trained, found, strict=False):
            each.grad = gradient
        return dict(zip(losses, found[len(trained) :], strict=True))

    @torch.no_grad()
    def _stop_seeds(self, per_seed: dict[str, list[float]]) -> None:
        """Give seeds that are no numbers any more their last good weights back. Raises NonFiniteLossError when none is left."""
        weights = [each.unflatten(0, (self.seeds, -1)) for each in self.algorithm.parameters() if each.numel()]
        good = [each.unflatten(0, (self.seeds, -1)) for each in self.good if each.numel()]
        finite = torch.stack([each.flatten(1).isfinite().all(1) for each in weights]).all(0).tolist()
        for place, seed in enumerate(self.sampler.seeds):
            bad = [name for name, values in per_seed.items() if not math.isfinite(values[place])]
            if place not in self.stopped and (bad or not finite[place]):
                what = f"the {bad[0]} loss of seed {seed} is" if bad else f"the weights of seed {seed} are"
                self.stopped[place] = (
                    f"{what} not finite after {self.gradient_steps} gradient steps; "
                    "lower its learning rate or look for extreme values in the observations and rewards."
                )
        if len(self.stopped) == self.seeds:
            raise NonFiniteLossError(next(iter(self.stopped.values())))
        for kept, now in zip(good, weights, strict=True):
            for place in self.stopped:
                now[place] = kept[place]
            kept.copy_(now)

    @torch.no_grad()
    def move_targets(self) -> None:
        """Bring the slow networks nearer to the fast ones, where it is time to."""
        rate, interval = self.algorithm.target_update
        if self.slow and self.gradient_steps % (interval or max(self.config.gradient_steps // COPIES, 1)) == 0:
            torch._foreach_lerp_(self.slow, self.fast, rate)  # pyright: ignore[reportPrivateImportUsage]

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, but for the log."""
        streams = {f"rows.{i}": each.get_state() for i, each in enumerate(self.sampler.generators)}
        streams |= {f"chances.{i}": each.get_state() for i, each in enumerate(self.sampler.chances)}
        named = [*self.algorithm.named_parameters(), *self.algorithm.named_buffers()]
        weights = {f"algorithm.{name}": each for name, each in named}
        kept = {f"kept.{steps}.{name}": each for steps, found in self.kept.items() for name, each in found.items()}
        adam = {f"adam.{name}": each for name, each in self.adam.tensors().items()}
        return {**streams, **weights, **kept, **adam, **(self.stop.tensors() if self.stop else {})}

    def save(self, checkpoint: Checkpoint) -> None:
        if parallel.place() > 0:
            return
        stopped = {str(seed): why for seed, why in self.stopped.items()}
        facts = {"gradient_steps": self.gradient_steps, "history": self.history, "stopped": stopped}
        checkpoint.save(self._tensors(), facts)

    @torch.no_grad()
    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on where the training that this is was saved, if it was."""
        saved = checkpoint.load()
        if saved is None:
            return
        tensors, facts = saved
        for name in tensors:
            if name.startswith("kept."):
                _, steps, weight = name.split(".", 2)
                self.kept.setdefault(int(steps), {})[weight] = tensors[name]
        for name, each in self._tensors().items():
            if not name.startswith(("rows.", "chances.")):
                each.copy_(tensors[name])
        for i, (rows, chances) in enumerate(zip(self.sampler.generators, self.sampler.chances, strict=True)):
            rows.set_state(tensors[f"rows.{i}"])
            chances.set_state(tensors[f"chances.{i}"])
        self.gradient_steps, self.history = facts["gradient_steps"], facts["history"]
        self.stopped = {int(seed): why for seed, why in facts["stopped"].items()}
        self.good = [each.detach().clone() for each in self.algorithm.parameters()]


@dataclass(frozen=True)
class Trained:
    """How a training went: mean losses per chunk, network and seed (None of a seed that was stopped), what stopped seeds, and the
    weights of earlier checkpoints by gradient steps; and how that of the model of the world went, if there is one."""

    history: list[dict[str, Any]]
    stopped: dict[int, str]
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    model: "Trained | None" = None

    def require_all(self) -> None:
        """Raises NonFiniteLossError when a seed was stopped: what is made of all seeds needs each of them to be finished."""
        if self.stopped:
            raise NonFiniteLossError(next(iter(self.stopped.values())))


def train(
    algorithm: nn.Module,
    transitions: Transitions,
    sampler: Sampler,
    config: TrainingConfig,
    *,
    chunk: int = 100,
    report: Report | None = None,
    checkpoint: Checkpoint | None = None,
    stop: Stopping | None = None,
    watch: Watch | None = None,
) -> Trained:
    """Train in place, from the checkpoint on if there is one of this training; `stop` judges after each chunk, and `watch` is
    shown the history of losses before the first one and after each.

    Raises NonFiniteLossError naming network, seed and step when no seed is left.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    where = transitions.device
    learner = Learner(algorithm.to(where), transitions, sampler, config, report, checkpoint, stop, watch)
    if checkpoint:
        learner.resume(checkpoint)
    if watch:
        watch(learner.history)
    with warnings.catch_warnings(), ready_to_train():
        # The loader yields numbers, not data; workers would only slow it down.
        warnings.filterwarnings("ignore", ".*does not have many workers.*", UserWarning)
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # lightning 2.6 against torch 2.13
        trainer = L.Trainer(
            max_epochs=1,
            accelerator=where.type,
            devices=1,
            precision="bf16-mixed" if config.precision == "bf16" else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        chunks = _Chunks(learner.gradient_steps, config.kept_after, chunk)
        if stop is None or not stop.done:
            trainer.fit(learner, DataLoader(chunks, batch_size=None))
    if checkpoint:
        learner.save(checkpoint)  # what follows may be cut short, too
    return Trained(learner.history, learner.stopped, dict(sorted(learner.kept.items())))
