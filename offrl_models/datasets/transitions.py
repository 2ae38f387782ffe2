"""Transitions on the training device, sampled with replacement, one generator per seed."""

import hashlib
from collections.abc import Collection, Iterator
from itertools import repeat
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from offrl_models.datasets.encoding import Encoded, Encoder, Observation
from offrl_models.datasets.views import looking_back
from offrl_models.schema import Episodes, InputError

GATHERED = 2**24  # bytes of batches that are gathered at once
RESIDENT = 0.5  # share of the free memory of a GPU that a log may take

Extra = Literal["next_action", "return_to_go"]  # parts of a batch that are left out unless asked for


def stream(seed: int, purpose: str) -> torch.Generator:
    """Random numbers for one purpose. torch reads 32 bits of a seed, so that seeds far apart may be the same one."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def kept_on(device: torch.device, size: int) -> torch.device:
    """Where a log of so many bytes is kept: on the device it is trained on, or where a GPU has no room for it, on the CPU, which
    maps its files."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if size <= RESIDENT * free else torch.device("cpu")


class NextProbs(NamedTuple):
    """What evaluated policies do at the next observation of every row. Each seed evaluates one of them."""

    probs: Float[Tensor, "policies distinct actions"]
    distinct_of_row: Int64[Tensor, "rows"]
    policy_of_seed: Int64[Tensor, "seed"]

    def at(self, row: Int64[Tensor, "*steps seed batch"]) -> Float[Tensor, "*steps seed batch actions"]:
        first = self.policy_of_seed[:, None] * self.probs.shape[1]
        return F.embedding(self.distinct_of_row[row] + first, self.probs.flatten(0, 1))


class Window(NamedTuple):
    """The rows of an episode up to one of it; rows before the first one stand in for it, and are not known."""

    observation: Observation  # each part [*steps, seed, batch, context, ...]
    action: Int64[Tensor, "*steps seed batch context"] | Float[Tensor, "*steps seed batch context dimensions"] | None
    return_to_go: Float[Tensor, "*steps seed batch context"]  # undiscounted: the rewards from each row on
    step: Int64[Tensor, "*steps seed batch context"]  # of each row in its episode
    known: Bool[Tensor, "*steps seed batch context"]
    mask: Bool[Tensor, "*steps seed batch context actions"] | None


class NextDraws(NamedTuple):
    """The same for continuous actions: some that evaluated policies draw at the next observation of every row."""

    actions: Float[Tensor, "policies rows draws dimensions"]
    policy_of_seed: Int64[Tensor, "seed"]
    generator: torch.Generator  # of which draw is used when; all policies use the same

    def at(self, row: Int64[Tensor, "*steps seed batch"]) -> Float[Tensor, "*steps seed batch dimensions"]:
        """One of the draws of each row, another one each time."""
        _, rows, draws, _ = self.actions.shape
        shape = (*row.shape[:-2], 1, row.shape[-1])
        draw = torch.randint(draws, shape, generator=self.generator).to(row.device)
        place = (self.policy_of_seed[:, None] * rows + row) * draws + draw
        return F.embedding(place, self.actions.flatten(0, 2))


class TransitionBatch(NamedTuple):
    """Transitions for all seeds at once; the seed axis always leads, but for one of gradient steps while they are gathered."""

    observation: Encoded  # each part [seed, batch, ...]
    action: Int64[Tensor, "*steps seed batch"] | Float[Tensor, "*steps seed batch dimensions"]
    action_prob: Float[Tensor, "*steps seed batch"]  # behavior probability or density of the action; NaN if not logged
    reward: Float[Tensor, "*steps seed batch"]
    discount: Float[Tensor, "*steps seed batch"]  # gamma * (1 - terminated)
    next_observation: Encoded
    mask: Bool[Tensor, "*steps seed batch actions"]
    next_mask: Bool[Tensor, "*steps seed batch actions"]
    row: Int64[Tensor, "*steps seed batch"]  # where in the split it came from
    next_probs: Float[Tensor, "*steps seed batch actions"] | None = None  # of the policy that is evaluated, if one is
    next_draw: Float[Tensor, "*steps seed batch dimensions"] | None = (
        None  # an action of it, where actions are continuous
    )
    uniform: Float[Tensor, "*steps seed batch draws numbers"] | None = (
        None  # random, on [0, 1): for what is drawn per row
    )
    step: int = 0  # gradient steps before this one
    # What only some algorithms want:
    next_action: Int64[Tensor, "*steps seed batch"] | Float[Tensor, "*steps seed batch dimensions"] | None = (
        None  # of the following row; any action after an episode's last one
    )
    return_to_go: Float[Tensor, "*steps seed batch"] | None = None  # discounted, from this row on, as recorded
    window: Window | None = None  # that ends at this row

    def unbind(self) -> "Iterator[TransitionBatch]":
        """The batch of each gradient step."""
        return map(TransitionBatch, *(_unbound(part) for part in self))

    def to(self, device: torch.device) -> "TransitionBatch":
        return TransitionBatch(*(_moved(part, device) for part in self))


def _unbound(part: Any) -> Iterator[Any]:
    match part:
        case None | int():
            return repeat(part)
        case Encoded() | Window():
            return map(type(part), *(_unbound(each) for each in part))
        case _:
            return iter(part.unbind())


def _moved(part: Any, device: torch.device) -> Any:
    match part:
        case None | int():
            return part
        case Encoded() | Window():
            return type(part)(*(_moved(each, device) for each in part))
        case _:
            return part.to(device)


class Transitions:
    """All usable rows of some episodes as tensors, which share the memory of the episodes where the device allows. Batches are
    on the `device`; so is the log, where there is room for it.

    A seed draws its own rows from its own generator, so its batches do not depend on which seeds train beside it. Observations
    are encoded as they are gathered: once for all networks, and without a second copy of the log.
    """

    def __init__(
        self,
        episodes: Episodes,
        encoder: Encoder,
        device: torch.device | str = "cpu",
        next_policy: NextProbs | NextDraws | None = None,
        extras: Collection[Extra] = (),
        context: int | None = None,
    ):
        """With `context`, batches have windows of so many rows."""
        usable = np.flatnonzero(episodes.bootstrappable)
        if len(usable) == 0:
            raise InputError(
                "no row can be trained on: every episode is truncated after one step and masks are logged."
            )
        self.device = torch.device(device)
        of_row = 4 * episodes.observation.shape[1] + episodes.n_actions + 64
        of_policies = sum(part.nbytes for part in next_policy or () if isinstance(part, Tensor))
        device = kept_on(self.device, episodes.n_rows * of_row + of_policies)
        self.rows = torch.as_tensor(usable, device=device)
        self.n_rows, self.encoder = episodes.n_rows, encoder.to(self.device)
        match next_policy:
            case NextProbs():
                next_policy = NextProbs(*(part.to(device) for part in next_policy))
            case NextDraws(actions, policy_of_seed, generator):
                next_policy = NextDraws(actions.to(device), policy_of_seed.to(device), generator)
        self.next_policy = next_policy

        def as_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
            if array.ndim and 0 in array.strides:  # one value for all rows
                return torch.as_tensor(array[:1].copy(), dtype=dtype, device=device).expand(*array.shape)
            return torch.as_tensor(array, dtype=dtype, device=device)

        self.observation = as_tensor(episodes.observation, torch.float32)
        self.final_observation = as_tensor(episodes.final_observation, torch.float32)
        self.action = as_tensor(episodes.action, torch.float32 if episodes.action.ndim > 1 else torch.long)
        self.action_prob = as_tensor(episodes.action_prob, torch.float32)
        self.reward = as_tensor(episodes.reward, torch.float32)
        self.discount = as_tensor(episodes.discount, torch.float32)
        self.mask = as_tensor(episodes.mask, torch.bool)
        following = np.arange(1, episodes.n_rows + 1)  # beyond the rows: the final observation of an episode
        last = episodes.offsets[1:] - 1
        # Nothing follows where the task ended: its own observation stands there, as good as any and surely a number.
        following[last] = np.where(episodes.terminated[last], last, episodes.n_rows + np.arange(episodes.n_episodes))
        self.following = as_tensor(following, torch.long)
        self.with_next_action = "next_action" in extras
        self.return_to_go = as_tensor(episodes.return_to_go, torch.float32) if "return_to_go" in extras else None
        self.context = context
        if context:
            self.step = as_tensor(episodes.step, torch.long)
            self.reward_to_go = as_tensor(episodes.reward_to_go, torch.float32)

    def take(self, row: Int64[Tensor, "*steps seed batch"]) -> TransitionBatch:
        """The transitions at some rows."""
        following = self.following[row]
        beyond, next_row = following >= self.n_rows, following.clamp(max=self.n_rows - 1)
        next_observation = self.observation.index_select(0, next_row.flatten()).unflatten(0, next_row.shape)
        next_observation[beyond] = self.final_observation[following[beyond] - self.n_rows]
        found = TransitionBatch(
            observation=self._encoded(_at(self.observation, row)),
            action=_at(self.action, row),
            action_prob=_at(self.action_prob, row),
            reward=self.reward[row],
            discount=self.discount[row],
            next_observation=self._encoded(next_observation),
            mask=_at(self.mask, row),
            # After the last row any mask will do, but an empty one would turn into NaN.
            next_mask=_at(self.mask, next_row) | beyond.unsqueeze(-1),
            row=row,
            next_probs=self.next_policy.at(row) if isinstance(self.next_policy, NextProbs) else None,
            next_draw=self.next_policy.at(row) if isinstance(self.next_policy, NextDraws) else None,
            next_action=_at(self.action, next_row) if self.with_next_action else None,
            return_to_go=None if self.return_to_go is None else self.return_to_go[row],
            window=self._window(row, self.context) if self.context else None,
        )
        return found.to(self.device)

    def _encoded(self, observation: Tensor) -> Encoded:
        return self.encoder(observation.to(self.device))

    def _window(self, last: Int64[Tensor, "*steps seed batch"], context: int) -> Window:
        back, known, step = looking_back(self.step[last], context)
        row = last.unsqueeze(-1) - back
        seen, action, mask = (_at(table, row) for table in (self.observation, self.action, self.mask))
        return Window(self._encoded(seen), action, self.reward_to_go[row], step, known, mask)

    def batches(self, sampler: "Sampler", steps: int) -> Iterator[TransitionBatch]:
        """The batch of each gradient step. As many as GATHERED allows are gathered at once: a step would pay for each gather."""
        row = sampler.draw(steps)
        numbers = self.encoder.n_numeric + 2 * self.encoder.n_categorical  # in units of 4 bytes
        per_row = 2 * 4 * (self.observation.shape[1] + numbers) + 6 * self.mask.shape[1] + 64 + 4 * sampler.numbers
        per_row *= 1 + (self.context or 0)
        for rows in row.split(max(1, GATHERED // (row[0].numel() * per_row))):
            yield from self.take(rows)._replace(uniform=sampler.uniform(len(rows), self.device)).unbind()


def _at(table: Tensor, row: Int64[Tensor, "*index"]) -> Tensor:
    """`table[row]`, without copies where all rows are one."""
    if len(table) > 1 and table.stride(0) == 0:
        return table[0].expand(*row.shape, *table.shape[1:])
    return table.index_select(0, row.flatten()).unflatten(0, row.shape)


class Sampler:
    """Draws rows for every seed; `pools` gives each seed rows of its own, as a bootstrap resample does.

    With every row come `draws` times `width` uniform numbers, for algorithms that draw actions. Processes that train together draw
    the same, and each takes its `share` of the rows.
    """

    def __init__(self, pools: list[Tensor], batch_size: int, seeds: list[int], draws: int = 0, width: int = 1):
        self.pools, self.batch_size, self.draws, self.width = pools, batch_size, draws, width
        self.seeds, self.share = seeds, slice(None)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        # Rows and chances are read from equal streams at different paces: but for the first, no number meets the row it drew.
        self.chances = [torch.Generator().manual_seed(seed) for seed in seeds]

    @property
    def numbers(self) -> int:
        """Random numbers for a row."""
        return self.draws * self.width

    def uniform(self, steps: int, device: torch.device) -> Float[Tensor, "steps seed batch draws numbers"] | None:
        """The random numbers of `steps` batches."""
        if not self.numbers:
            return None
        shape = (steps, self.batch_size, self.draws, self.width)
        return torch.stack([torch.rand(shape, generator=each)[:, self.share] for each in self.chances], 1).to(device)

    def draw(self, steps: int) -> Int64[Tensor, "steps seed batch"]:
        """Rows for `steps` batches."""
        drawn = [
            pool[torch.randint(len(pool), (steps, self.batch_size), generator=generator)[:, self.share].to(pool.device)]
            for pool, generator in zip(self.pools, self.generators, strict=True)
        ]
        return torch.stack(drawn, 1)
