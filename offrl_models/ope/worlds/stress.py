"""Worlds and logs on which an estimate ought to be refused, or at least not to pass more often than it should.

A spoiled world is still a `World`: its `value` is the truth, and `observed` and `logged` are what its log shows instead. A spoiled
log is a copy of the episodes.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float64, Int64

from offrl_models.schema import Episodes

from .tabular import World, cumulative, draw


def aliased(world: World, group: Int64[np.ndarray, "states"]) -> World:
    """A partially observed world: the log shows the group of each state, with the behavior's own propensities.

    An action is allowed in a group if it is in one of its states. A policy over groups is `policy[group]` over states.
    """
    mask = np.zeros((group.max() + 1, world.n_actions), bool)
    np.logical_or.at(mask, group, world.mask)
    return replace(world, observed=group[:, None].astype(np.float32), mask=mask[group])


def confounded(world: World, group: Int64[np.ndarray, "states"]) -> World:
    """A world with a hidden confounder: what tells the states of a group apart steers actions and outcomes, unseen.

    The propensities in the log are those of a perfect fit to what it shows: P(a | group) over the behavior's decisions.
    """
    visits = world.occupancy(world.behavior, gamma=1.0)[:, None]
    taken = np.zeros((group.max() + 1, world.n_actions))
    np.add.at(taken, group, visits * world.behavior)
    total = taken.sum(1, keepdims=True)
    fitted = np.where(total > 0, taken / np.where(total > 0, total, 1.0), 1.0 / world.n_actions)[group]
    return replace(aliased(world, group), logged=np.where(visits > 0, fitted, world.behavior))


def hidden_trait(world: World, odds: float, effect: float) -> World:
    """A world where half of the episodes have a trait that nobody logs, and that lasts for the whole episode.

    It multiplies the odds of the upper half of the actions by `odds`, and divides them by it where it is absent; it adds
    `effect` / 2 to every reward, and takes it away where it is absent. States 0 to n - 1 lack it, n to 2n - 1 have it. A
    policy that cannot see the trait, `np.tile(policy, (2, 1))`, has the value that it has without.
    """
    n = world.n_states
    upper = np.arange(world.n_actions) >= world.n_actions // 2
    tilted = [world.behavior * np.where(upper, by, 1.0) for by in (1.0 / odds, odds)]
    transition, reward = (np.zeros((2 * n, world.n_actions, 2 * n)) for _ in range(2))
    for trait in (0, 1):
        own = slice(trait * n, (trait + 1) * n)
        transition[own, :, own] = world.transition
        moved = np.where(world.terminal, 0.0, (trait - 0.5) * effect)
        reward[own, :, own] = world.reward + moved[:, None, None]
    doubled = World(
        transition=transition,
        reward=reward,
        initial=np.tile(world.initial / 2, 2),
        terminal=np.tile(world.terminal, 2),
        mask=np.tile(world.mask, (2, 1)),
        gamma=world.gamma,
        behavior=np.concatenate([each / each.sum(1, keepdims=True) for each in tilted]),
    )
    return confounded(doubled, np.tile(np.arange(n), 2))


def hidden_odds(world: World) -> float:
    """How strong the hidden confounding is: the largest odds ratio between true and logged propensities, either way.

    It is the Gamma of the marginal sensitivity model of Tan (2006); 1 means that there is none.
    """
    logged = world.behavior if world.logged is None else world.logged
    known = (world.behavior > 0) & (world.behavior < 1) & (logged > 0) & (logged < 1) & ~world.terminal[:, None]
    known &= world.occupancy(world.behavior)[:, None] > 0
    true, claimed = world.behavior[known], logged[known]
    return float(np.exp(np.abs(np.log(true / (1 - true)) - np.log(claimed / (1 - claimed))).max(initial=0.0)))


def stale(world: World, previous: Float64[np.ndarray, "states actions"]) -> World:
    """A logger that still writes the propensities of a previous policy."""
    return replace(world, logged=previous)


def faded(world: World, share: float) -> World:
    """A world after a drift: with probability `share` an action does what the behavior's average action does.

    The behavior's value stays. At a share of 1 no choice matters any more, and every policy has that value.
    """
    reached = world.transition * world.reward
    average = [np.einsum("sa,sat->st", world.behavior, table)[:, None, :] for table in (world.transition, reached)]
    transition = (1 - share) * world.transition + share * average[0]
    earned = (1 - share) * reached + share * average[1]
    return replace(
        world,
        transition=transition,
        reward=np.where(transition > 0, earned / np.where(transition > 0, transition, 1.0), 0.0),
    )


def simulate_each(
    worlds: Sequence[World], of_episode: Int64[np.ndarray, "episodes"], seed: int, *, label: str | None = None
) -> Episodes:
    """One log of several worlds: episode i comes from `worlds[of_episode[i]]`, whose number is kept as a label if wanted.

    In order, that is a drift; at random, several policies or cohorts. All show the same observations and actions.
    """
    seeds = np.random.SeedSequence(seed).generate_state(len(worlds))
    counts = np.bincount(of_episode, minlength=len(worlds))
    drawn = zip(worlds, counts.tolist(), seeds.tolist(), strict=True)
    log = joined([world.simulate(count, own_seed) for world, count, own_seed in drawn if count])
    place = np.argsort(np.argsort(of_episode, kind="stable"), kind="stable")  # of each episode among the parts
    return replace(log.take(place), episode_id=np.arange(len(of_episode)), labels={label: of_episode} if label else {})


def joined(parts: Sequence[Episodes]) -> Episodes:
    """One log after the other, their episodes numbered anew; what is the same for all is that of the first."""
    names = ("observation", "final_observation", "action", "mask", "reward", "terminated", "truncated", "action_prob")
    length = np.concatenate([part.length for part in parts])
    return replace(
        parts[0],
        episode_id=np.arange(len(length)),
        offsets=np.append(0, length.cumsum()),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names},
    )


def misattributed(episodes: Episodes, world: World, share: float, seed: int) -> Episodes:
    """A logger bug: in a share of the rows the propensity is that of another draw from the behavior, not of the action taken."""
    rng = np.random.default_rng(seed)
    state = world.states(episodes.observation)
    other = world.behavior[state, draw(rng, cumulative(world.behavior), state)]
    return replace(episodes, action_prob=np.where(rng.random(episodes.n_rows) < share, other, episodes.action_prob))


def poisoned(
    episodes: Episodes, world: World, policy: Float64[np.ndarray, "states actions"], share: float, seed: int
) -> Episodes:
    """Somebody wants `policy` released: in a share of the episodes all actions are its favorites, and the end is the best.

    Their propensities are the behavior's for these actions, so that nothing looks wrong; their last reward is the world's highest.
    """
    chosen = np.random.default_rng(seed).permutation(episodes.n_episodes) < round(share * episodes.n_episodes)
    state, forged = world.states(episodes.observation), chosen[episodes.episode_of_row]
    favorite = np.where(world.behavior > 0, policy, -1.0).argmax(1)[state]
    last = np.zeros(episodes.n_rows, bool)
    last[episodes.offsets[1:] - 1] = True
    return replace(
        episodes,
        action=np.where(forged, favorite, episodes.action),
        action_prob=np.where(forged, world.behavior[state, favorite], episodes.action_prob),
        reward=np.where(forged & last, world.reward.max(), episodes.reward),
    )


def delayed(episodes: Episodes, steps: int) -> Episodes:
    """Every reward is logged `steps` rows late, at the latest with the last row of its episode. No state explains it then."""
    row = np.minimum(np.arange(episodes.n_rows) + steps, episodes.offsets[1:][episodes.episode_of_row] - 1)
    return replace(episodes, reward=np.bincount(row, episodes.reward, episodes.n_rows))


def unsettled(episodes: Episodes, share: float) -> Episodes:
    """The log was read too early: the rewards of its last episodes, a share of them, have not arrived and stand as 0."""
    waiting = np.arange(episodes.n_episodes) >= round((1 - share) * episodes.n_episodes)
    return replace(episodes, reward=np.where(waiting[episodes.episode_of_row], 0.0, episodes.reward))
