"""Behavior clones: the policy that wrote a log, learned from the log as long as episodes held out become likelier by it.

A network that is trained on and on learns the actions of its rows by heart, and then calls what was done in other episodes too
rare: ratios of a policy to it have a mean above 1, and nothing can be judged by them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from offrl_models.algorithms import BC, Algorithm, BCConfig
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.transitions import Sampler, TransitionBatch, Transitions
from offrl_models.learner import train
from offrl_models.ope.units import fold_of, independent
from offrl_models.schema import Episodes
from offrl_models.training import ModelReport, device
from offrl_models.training_config import TrainingConfig

PARTS = 5  # of the episodes one is held out
HELD_OUT = 4096  # rows at most, at which a clone is judged
OFTEN, SELDOM = (
    25,
    500,
)  # gradient steps from one judgement to the next, at least and at most; else a pass over the rows
PATIENCE = 10  # judgements without a better one after which a seed is done


class LikeliestWeights:
    """Keeps of every seed the weights by which the actions held out are the likeliest; a seed for which they were found is left as
    it is then, so that it does not depend on how long others train beside it."""

    def __init__(self, clone: BC, held_out: TransitionBatch):
        self.clone, self.held_out = clone, held_out
        self.weights = [each for each in clone.parameters() if each.numel()]
        self.best = [each.detach().clone() for each in self.weights]
        seeds = len(held_out.reward)
        self.error = torch.full((seeds,), torch.inf, device=held_out.reward.device)
        self.waited = torch.zeros(seeds, dtype=torch.long, device=held_out.reward.device)

    @property
    def done(self) -> bool:
        """Whether every seed is."""
        return bool((self.waited >= PATIENCE).all())

    def tensors(self) -> dict[str, Tensor]:
        """Everything that later judgements depend on."""
        best = {f"stop.best.{place}": each for place, each in enumerate(self.best)}
        return {**best, "stop.error": self.error, "stop.waited": self.waited}

    @torch.no_grad()
    def judge(self) -> dict[str, list[float]]:
        """Judge the weights as they are now: the loss on the rows held out, of each seed."""
        (error,) = self.clone.losses(self.held_out).values()
        better = (error < self.error) & (self.waited < PATIENCE)
        self.error = torch.where(better, error, self.error)
        self.waited = torch.where(better, 0, self.waited + 1)
        for kept, now in zip(self.best, self.weights, strict=True):
            kept[better] = now[better]
        return {"policy_held_out": error.tolist()}

    @torch.no_grad()
    def keep_best(self) -> None:
        for kept, now in zip(self.best, self.weights, strict=True):
            now.copy_(kept)


def fit_clone(
    config: BCConfig,
    episodes: Episodes,
    encoder: Encoder,
    *,
    seeds: Sequence[int],
    report: ModelReport | None = None,
    **training: Any,
) -> Algorithm:
    """A clone of several seeds, on the CPU. `training` are fields of TrainingConfig, whose gradient steps are the most.

    One episode in PARTS, those of an entity together, is held out, where there are as many. Raises NonFiniteLossError when the
    losses of a seed explode.
    """
    how = TrainingConfig(**training)
    clone = BC(config, encoder, episodes.actions, seeds)
    transitions = Transitions(episodes, encoder, device())
    rows, held_out = _parted(episodes, transitions)
    sampler = Sampler([rows] * len(seeds), how.batch_size, list(seeds))
    every, stop = min(max(len(rows) // how.batch_size, OFTEN), SELDOM), None
    if len(held_out):
        stop = LikeliestWeights(clone.to(transitions.device), transitions.take(held_out.expand(len(seeds), -1)))

    def told(steps: int, losses: dict[str, float]) -> None:
        if report:
            report(steps, steps if stop and stop.done else how.gradient_steps, losses)

    train(clone, transitions, sampler, how, chunk=every, report=told, stop=stop).require_all()
    if stop:
        stop.keep_best()
    return clone.cpu()


def _parted(episodes: Episodes, transitions: Transitions) -> tuple[Int64[Tensor, "rows"], Int64[Tensor, "held"]]:
    """The rows to learn from and those held out; none are where nothing would be left, or nothing to judge by."""
    if independent(episodes) < PARTS:
        return transitions.rows, transitions.rows[:0]
    first = torch.as_tensor(fold_of(episodes, PARTS) == 0, device=transitions.rows.device)
    held = first[torch.as_tensor(episodes.episode_of_row, device=first.device)[transitions.rows]]
    rows = transitions.rows
    return (rows, rows[:0]) if held.all() or not held.any() else (rows[~held], rows[held][:HELD_OUT])
