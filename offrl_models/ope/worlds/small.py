"""Small worlds with closed-form values: a published graph, a long chain, and a contextual bandit."""

import numpy as np
from jaxtyping import Float64

from .tabular import World


def toy_graph(
    horizon: int = 4, gamma: float = 0.98, *, slippage: float = 0.25, sparse: bool = False, behavior: float = 0.5
) -> World:
    """ToyGraph of COBS: two rows of nodes, action 0 to the upper one, action 1 to the lower one; `horizon` steps, at least 2.

    With probability `slippage` the step goes to the other row. Entering the upper row is worth 1 and the lower one -1; the
    last step, from either row to the end, is worth the same once more; with `sparse`, it alone is worth anything. A
    policy that plays action 0 with probability p everywhere has the value (2 p - 1) (1 - 2 slippage) sum_{t < horizon} gamma^t
    (sparse: the last term alone). `behavior` is the p of the behavior policy.

    Voloshin, Le, Jiang & Yue (2019), https://arxiv.org/abs/1911.06854.
    """
    n = 2 * horizon
    step = (np.arange(n) + 1) // 2  # 0; then upper and lower by turns: 1, 1, 2, 2, ...; the end
    transition, reward = np.zeros((n, 2, n)), np.zeros((n, 2, n))
    for state in range(n - 1):
        if step[state] == horizon - 1:
            transition[state, :, n - 1] = 1.0
            reward[state, :, n - 1] = 1.0 if state % 2 else -1.0
        else:
            upper = 2 * step[state] + 1
            transition[state, :, upper : upper + 2] = [[1 - slippage, slippage], [slippage, 1 - slippage]]
            reward[state, :, upper : upper + 2] = 0.0 if sparse else [1.0, -1.0]
    transition[n - 1, :, n - 1] = 1.0
    return World(
        transition=transition,
        reward=reward,
        initial=np.eye(n)[0],
        terminal=np.arange(n) == n - 1,
        mask=np.ones((n, 2), bool),
        gamma=gamma,
        behavior=np.tile([behavior, 1 - behavior], (n, 1)),
    )


def chain(steps: int = 50, positions: int = 3, gamma: float = 1.0, *, slippage: float = 0.1) -> World:
    """A walk between two walls for a fixed number of steps: action 1 goes right and action 0 left, slipping now and then.

    Each step is worth (where it leads) / (positions - 1) / steps, so that returns lie in [0, 1]. The state is the position
    at a step, `step * positions + position`; the behavior policy tosses a coin. Ratios of state occupancies stay small while
    the variance of products of action ratios grows exponentially in `steps`: the curse of horizon of
    Liu, Li, Tang & Zhou (2018), https://arxiv.org/abs/1810.12429.
    """
    n = steps * positions + 1
    transition, reward = np.zeros((n, 2, n)), np.zeros((n, 2, n))
    walk = np.zeros((positions, 2, positions))
    here = np.arange(positions)
    for action in (0, 1):
        for toward, probability in ((action, 1 - slippage), (1 - action, slippage)):
            walk[here, action, np.clip(here + 2 * toward - 1, 0, positions - 1)] += probability
    for step in range(steps - 1):
        now, then = (slice((step + k) * positions, (step + k + 1) * positions) for k in (0, 1))
        transition[now, :, then] = walk
        reward[now, :, then] = here / (positions - 1) / steps
    last = slice((steps - 1) * positions, n - 1)
    transition[last, :, n - 1] = 1.0
    reward[last, :, n - 1] = walk @ here / (positions - 1) / steps  # there is one end, wherever the last step leads
    transition[n - 1, :, n - 1] = 1.0
    initial = np.zeros(n)
    initial[positions // 2] = 1.0
    return World(
        transition=transition,
        reward=reward,
        initial=initial,
        terminal=np.arange(n) == n - 1,
        mask=np.ones((n, 2), bool),
        gamma=gamma,
        behavior=np.full((n, 2), 0.5),
    )


def bandit(contexts: int, actions: int, columns: int, seed: int, *, temperature: float = 1.0) -> World:
    """A contextual bandit: a context with features x is shown, an action is chosen, a click is worth 1, and that is all.

    Clicks have probability sigmoid(theta_a . x - 1). The behavior is a softmax of noisy guesses of these scores, flatter at a
    higher temperature. A log shows the features alone; `World.states` tells the contexts. The value of a policy is
    sum_x d(x) sum_a pi(a|x) P(click | x, a). Other logging policies: `random_policy` and `simulate_each`.
    """
    rng = np.random.default_rng(seed)
    n = contexts + 2  # then no click, click
    features = rng.normal(size=(contexts, columns)).astype(np.float32)
    scores = features @ rng.normal(size=(columns, actions)) / np.sqrt(columns) - 1.0
    click = 1.0 / (1.0 + np.exp(-scores))
    transition, reward = np.zeros((n, actions, n)), np.zeros((n, actions, n))
    transition[:contexts, :, -2:] = np.stack([1.0 - click, click], 2)
    transition[[-2, -1], :, [-2, -1]] = 1.0
    reward[:contexts, :, -1] = 1.0
    behavior = np.full((n, actions), 1.0 / actions)
    behavior[:contexts] = _softmax((scores + rng.normal(size=scores.shape)) / temperature)
    return World(
        transition=transition,
        reward=reward,
        initial=np.append(rng.dirichlet(np.full(contexts, 5.0)), [0.0, 0.0]),
        terminal=np.arange(n) >= contexts,
        mask=np.ones((n, actions), bool),
        gamma=1.0,
        behavior=behavior,
        observed=np.concatenate([features, np.zeros((2, columns), np.float32)]),
    )


def _softmax(scores: Float64[np.ndarray, "rows values"]) -> Float64[np.ndarray, "rows values"]:
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)
