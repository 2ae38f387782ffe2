"""A learned model of the world: an ensemble of networks that tell what follows an observation and an action.

Numbers and the reward that follow are Gaussian, categories are drawn from a softmax over their codes, and whether the task ends is
learned like any other event, so that nobody writes a termination function for a task. Chua, Calandra, McAllister & Levine (2018),
"Deep reinforcement learning in a handful of trials", https://arxiv.org/abs/1805.12114; defaults of OfflineRL-Kit.
Differences from the source: layers are ReLU where theirs are swish, without weight decay; what is predicted is standardised, the
bounds of the scales are fixed, what is simulated stays within the range of the log, and training ends after `dynamics_steps` at
the latest.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field, PositiveInt, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import MEMBER
from offrl_models.datasets.encoding import Encoded, Encoder
from offrl_models.datasets.transitions import TransitionBatch, Transitions
from offrl_models.distributions import Actions, Categorical
from offrl_models.model_losses import (
    category_loss,
    event_loss,
    gaussian_loss,
    known_squared_error,
    largest_deviation,
    largest_distance,
)
from offrl_models.nets import MLP, Box, JointMLP

NARROWEST, WIDEST = -5.0, 2.0  # logarithm of the scale of a number that is predicted, whose standard deviation is 1
ALLOWED = 2.0  # logit with which every action begins as allowed
ROWS_AT_A_TIME = 65_536


@dataclass(frozen=True, kw_only=True)
class DynamicsConfig:
    dynamics_hidden: tuple[PositiveInt, ...] = Field(default=(200, 200, 200, 200), min_length=1)
    dynamics_learning_rate: float = Field(default=1e-3, gt=0)
    dynamics_steps: int = Field(default=10_000, ge=1)  # gradient steps of the model at most
    members: int = Field(default=7, ge=2)
    elites: int = Field(
        default=5, ge=1, validate_default=True
    )  # members that simulate: those of the least error on rows held out

    @field_validator("elites")
    @classmethod
    def _elites_are_members(cls, value: int, info: Any) -> int:
        if value > info.data.get("members", value):
            raise ValueError(f"should be at most the number of members, {info.data['members']}")
        return value


class Prediction(NamedTuple):
    """What networks expect, in units in which each number's change and the reward have a standard deviation of 1."""

    mean: Float[Tensor, "*batch numbers"]  # change of each number, then the reward
    log_scale: Float[Tensor, "*batch numbers"]
    event: Float[Tensor, "*batch events"]  # logits: the task ends, then each number that may be missing is
    category: Float[Tensor, "*batch rows"]  # logits of all categories of all columns


class Simulated(NamedTuple):
    """One step of the model, and what each member expected of it."""

    next_observation: Encoded
    reward: Float[Tensor, "seed batch"]
    discount: Float[Tensor, "seed batch"]  # gamma, or 0 where the task ended
    next_mask: Bool[Tensor, "seed batch actions"]
    prediction: Prediction  # [seed, member, batch, ...]


class Dynamics(nn.Module):
    """The members of each seed on the seed axis, [seed * member]: each is a seed to the learner, with rows of its own.

    Besides the transition each learns which discrete actions an observation allows, since a simulated one comes without a mask: an
    action is allowed where that is likelier than not, and the likeliest one always.
    """

    targets: ClassVar[dict[str, str]] = {}
    target_update = (1.0, 1)
    draws = 0
    low: Tensor
    high: Tensor
    shift: Tensor
    scale: Tensor
    gamma: Tensor
    elite: Tensor
    holdout_error: Tensor
    farthest: Tensor

    def __init__(self, config: DynamicsConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]):
        super().__init__()
        self.config, self.encoder, self.actions = config, encoder, actions if isinstance(actions, int) else None
        self.box = None if isinstance(actions, int) else Box(actions)
        self.seeds = [seed + MEMBER * (member + 1) for seed in seeds for member in range(config.members)]
        self.counts = [feature.categories for feature in encoder.features if feature.categories is not None]
        self.plain = encoder.n_numeric - encoder.n_nullable  # numbers, without the columns that tell of missing ones
        self.parts = (self.plain + 1, self.plain + 1, 1 + encoder.n_nullable, encoder.table_rows)
        inputs = actions if isinstance(actions, int) else len(actions)
        self.transition = JointMLP(self.seeds, "dyn", encoder, config.dynamics_hidden, inputs, sum(self.parts))
        if self.actions:
            self.allowed = MLP(self.seeds, "allow", encoder, config.dynamics_hidden, self.actions)
            with torch.no_grad():
                self.allowed.last_bias().add_(ALLOWED)
        self.numbers = 1 + self.plain + 1 + 1 + encoder.n_nullable + len(self.counts)  # drawn for a step of a row
        for name, start in (("low", -torch.inf), ("high", torch.inf), ("shift", 0.0), ("scale", 1.0)):
            self.register_buffer(name, torch.full((self.plain + 1,), start))
        self.register_buffer("gamma", torch.ones(()))
        self.register_buffer("elite", torch.arange(config.elites).repeat(len(seeds), 1))  # [seed, elites]
        self.register_buffer("holdout_error", torch.full((len(seeds), config.members), torch.inf))
        self.register_buffer("farthest", torch.full((len(seeds),), torch.inf))  # disagreement on the rows held out

    def learning_rates(self) -> dict[str, float]:
        names = ("transition", "allowed") if self.actions else ("transition",)
        return dict.fromkeys(names, self.config.dynamics_learning_rate)

    @torch.no_grad()
    def measure(self, transitions: Transitions, rows: Int64[Tensor, "rows"]) -> None:
        """Learn from these rows the scale of what is to be predicted, its range, and the discount."""
        count, total, squares = (torch.zeros_like(self.shift, dtype=torch.float64) for _ in range(3))
        low, high, gamma = torch.full_like(self.low, torch.inf), torch.full_like(self.low, -torch.inf), self.gamma * 0.0
        for part in rows.split(ROWS_AT_A_TIME):
            batch = transitions.take(part.unsqueeze(0))
            following, known = (each.squeeze(0) for each in self._following(batch))
            here = torch.cat([batch.observation.numeric[0, :, : self.plain], batch.reward.T], -1)
            after = torch.where(known, here + following, here)
            after[:, -1] = here[:, -1]
            low, high = (torch.minimum(low, here.amin(0)), torch.maximum(high, here.amax(0)))
            low, high = (torch.minimum(low, after.amin(0)), torch.maximum(high, after.amax(0)))
            gamma = torch.maximum(gamma, batch.discount.amax())
            following = torch.where(known, following.double(), 0.0)
            count, total, squares = count + known.sum(0), total + following.sum(0), squares + following.square().sum(0)
        mean = total / count.clamp(min=1)
        deviation = (squares / count.clamp(min=1) - mean.square()).clamp(min=0.0).sqrt()
        self.shift.copy_(mean)
        self.scale.copy_(torch.where(deviation > 1e-6 * (1.0 + mean.abs()), deviation, 1.0))
        self.low.copy_(low)
        self.high.copy_(high)
        self.gamma.copy_(gamma)

    def _following(
        self, batch: TransitionBatch
    ) -> tuple[Float[Tensor, "*batch numbers"], Bool[Tensor, "*batch numbers"]]:
        """The change of every number and the reward, as logged, and which of them were: nothing follows the end of a task."""
        change = (batch.next_observation.numeric - batch.observation.numeric)[..., : self.plain]
        goes_on = (batch.discount > 0).unsqueeze(-1)
        known = goes_on.expand(*change.shape).clone()
        known[..., self.encoder.nullable] &= batch.next_observation.numeric[..., self.plain :] == 0.0
        reward = batch.reward.unsqueeze(-1)
        return torch.cat([change, reward], -1), torch.cat([known, torch.ones_like(goes_on)], -1)

    def _outputs(self, observation: Encoded, action: Tensor) -> Float[Tensor, "seed_member batch outputs"]:
        if self.box is None:
            assert self.actions is not None
            return self.transition(
                observation, nn.functional.one_hot(action, self.actions).to(observation.numeric.dtype)
            )
        return self.transition(observation, self.box.unit(action))

    def _read(self, outputs: Float[Tensor, "*batch outputs"]) -> Prediction:
        mean, raw, event, category = outputs.split(self.parts, -1)
        softplus = nn.functional.softplus
        return Prediction(mean, NARROWEST + softplus(WIDEST - softplus(WIDEST - raw) - NARROWEST), event, category)

    def losses(self, batch: TransitionBatch) -> dict[str, Float[Tensor, "seed_member"]]:
        """One loss per member of each seed, of the transition and of the masks."""
        found = self._read(self._outputs(batch.observation, batch.action))
        following, known = self._following(batch)
        target = (following - self.shift) / self.scale
        losses = {"transition": gaussian_loss(found.mean, found.log_scale, target, known) + self._coded(found, batch)}
        return losses | self._masked(batch)

    @torch.no_grad()
    def errors(self, batch: TransitionBatch) -> dict[str, Float[Tensor, "seed_member"]]:
        """What rows held out are judged by: squared errors where `losses` has densities."""
        found = self._read(self._outputs(batch.observation, batch.action))
        following, known = self._following(batch)
        target = (following - self.shift) / self.scale
        return {
            "transition": known_squared_error(found.mean, target, known) + self._coded(found, batch)
        } | self._masked(batch)

    def _coded(self, found: Prediction, batch: TransitionBatch) -> Float[Tensor, "seed_member"]:
        """Of categories and events."""
        goes_on = batch.discount > 0
        absent = batch.next_observation.numeric[..., self.plain :] > 0.0
        happened = torch.cat([~goes_on.unsqueeze(-1), absent], -1)
        known = torch.cat([torch.ones_like(goes_on.unsqueeze(-1)), goes_on.unsqueeze(-1).expand(*absent.shape)], -1)
        loss = event_loss(found.event, happened, known)
        codes = batch.next_observation.codes - self.encoder.offset
        for place, logits in enumerate(found.category.split(self.counts, -1) if self.counts else ()):
            loss = loss + category_loss(logits, codes[..., place], goes_on)
        return loss

    def _masked(self, batch: TransitionBatch) -> dict[str, Float[Tensor, "seed_member"]]:
        if not self.actions:
            return {}
        return {"allowed": event_loss(self.allowed(batch.observation), batch.mask, torch.ones_like(batch.mask))}

    def _each(self, observation: Encoded) -> Encoded:
        """The observation once for each member of each seed."""
        return Encoded(*(part.repeat_interleave(self.config.members, 0) for part in observation))

    def predict(self, observation: Encoded, action: Tensor) -> Prediction:
        """What each member expects, [seed, member, batch, ...]."""
        outputs = self._outputs(self._each(observation), action.repeat_interleave(self.config.members, 0))
        return self._read(outputs.unflatten(0, (-1, self.config.members)))

    @torch.no_grad()
    def step(self, observation: Encoded, action: Tensor, uniform: Float[Tensor, "seed batch numbers"]) -> Simulated:
        """What follows each observation [seed, batch] and action, drawn from a random elite at `numbers` uniform numbers."""
        found = self.predict(observation, action)
        sizes = [1, self.plain + 1, 1 + self.encoder.n_nullable, len(self.counts)]
        for_elite, for_numbers, for_events, for_categories = uniform.split(sizes, -1)
        place = (for_elite.squeeze(-1) * self.config.elites).long().clamp(max=self.config.elites - 1)
        member = self.elite.gather(1, place)
        own = Prediction(*(_of_member(part, member) for part in found))
        noise = torch.special.ndtri(for_numbers.clamp(1e-6, 1.0 - 1e-6))
        following = self.shift + self.scale * (own.mean + own.log_scale.exp() * noise)
        following[..., : self.plain] += observation.numeric[..., : self.plain]
        following = following.clamp(self.low, self.high)
        happened = for_events < torch.sigmoid(own.event)
        numbers, absent = following[..., : self.plain], happened[..., 1:]
        stand_in = ((self.encoder.stand_in - self.encoder.mean) / self.encoder.scale)[self.encoder.nullable]
        nullable = numbers[..., self.encoder.nullable]
        numbers[..., self.encoder.nullable] = torch.where(absent, stand_in, nullable)
        codes = [
            Categorical(logits.log_softmax(-1)).sample(for_categories[..., place, None, None]).squeeze(-1)
            for place, logits in enumerate(own.category.split(self.counts, -1) if self.counts else ())
        ]
        coded = torch.stack(codes, -1) if codes else observation.codes
        next_observation = Encoded(torch.cat([numbers, absent.to(numbers.dtype)], -1), coded + self.encoder.offset)
        return Simulated(
            next_observation=next_observation,
            reward=following[..., -1],
            discount=self.gamma * (~happened[..., 0]).to(following.dtype),
            next_mask=self.mask(next_observation, member),
            prediction=found,
        )

    def mask(self, observation: Encoded, member: Int64[Tensor, "seed batch"]) -> Bool[Tensor, "seed batch actions"]:
        """Actions that a member takes to be allowed; no columns for continuous ones."""
        if not self.actions:
            return torch.ones(*member.shape, 0, dtype=torch.bool, device=member.device)
        logits = self.allowed(self._each(observation)).unflatten(0, (-1, self.config.members))
        own = _of_member(logits, member)
        return (own > 0.0) | (own == own.amax(-1, keepdim=True))

    def deviation(self, found: Prediction) -> Float[Tensor, "seed batch"]:
        """How uncertain a step is: the largest standard deviation of a member from what all expect, over numbers, reward and
        categories together. Whether the task ends and which numbers are missing are no part of it.

        Numbers are in units of their standard deviation in the log, the reward in its own, a category is a vector with a single 1.
        """
        share, units = self._shares(found.category), self._units()
        mean = torch.cat([units * found.mean, share], -1)
        return largest_deviation(mean, torch.cat([(units * found.log_scale.exp()).square(), share * (1.0 - share)], -1))

    def disagreement(self, found: Prediction) -> Float[Tensor, "seed batch"]:
        """How far what two members expect is apart at most, in the units of `deviation`; the end of the task, and
        whether a number is missing, are from 0 to 1."""
        expected = (self._units() * found.mean, found.event.sigmoid(), self._shares(found.category))
        return largest_distance(torch.cat(expected, -1))

    def _shares(self, logits: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch rows"]:
        """Probabilities of the categories of each column."""
        return torch.cat([part.softmax(-1) for part in logits.split(self.counts, -1)], -1) if self.counts else logits

    def _units(self) -> Float[Tensor, "numbers"]:
        """Of a predicted change, in standard deviations of the number itself; of the reward 1."""
        return torch.cat([self.scale[:-1], torch.ones_like(self.scale[-1:])])


def _of_member(parts: Float[Tensor, "seed member batch n"], member: Int64[Tensor, "seed batch"]) -> Tensor:
    """For each row the numbers of one member."""
    place = member[:, None, :, None].expand(-1, 1, -1, parts.shape[-1])
    return parts.gather(1, place).squeeze(1)
