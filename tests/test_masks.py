"""Forbidden actions stay forbidden whatever a network says, and masks change nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offrl_models.exported import OnnxPolicy
from offrl_models.exporting import export_checked
from offrl_models.nets import likely_enough, masked, masked_log_softmax
from offrl_models.policies import Mixture
from tests.test_algorithms import EPISODES, WORLD, build

SOME = torch.tensor([True, False, True])


def values(seed: int, scale: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return scale * torch.randn(50, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 1e2, 2e9, 1e14])
def test_a_mask_leaves_what_the_allowed_actions_would_be_alone(scale: float, dtype: torch.dtype) -> None:
    """Values, of whatever size, and gradients, to the last bit."""
    logits, alone = values(0, scale, dtype).requires_grad_(), values(0, scale, dtype)[:, SOME].requires_grad_()
    found, wanted = masked_log_softmax(logits, SOME.expand(50, 3)), torch.log_softmax(alone, -1).clamp(min=-1e9)
    assert torch.equal(found[:, SOME], wanted) and bool((found[:, 1] == -1e9).all())
    found.exp().square().sum().backward()
    wanted.exp().square().sum().backward()
    assert logits.grad is not None and alone.grad is not None
    assert torch.equal(logits.grad[:, SOME], alone.grad) and not logits.grad[:, 1].any()


@pytest.mark.parametrize("shift", [0.0, -2e9, -1e14, 1e14])
def test_no_maximum_is_that_of_a_forbidden_action(shift: float) -> None:
    q, mask = values(1, 1.0) + shift, SOME.expand(50, 3)
    assert not (masked(q, mask).argmax(-1) == 1).any()
    assert torch.equal(masked(q, mask).amax(-1), q[:, SOME].amax(-1))
    assert not likely_enough(q, mask, 0.0)[:, 1].any() and bool(likely_enough(q, mask, 0.0)[:, SOME].all())


def fallen(name: str, q: float) -> Any:
    """An algorithm whose Q has diverged downwards in all states."""
    algorithm = build(name, [0], temperature=0.01)
    (algorithm.q if hasattr(algorithm.q, "last_bias") else algorithm.q.net).last_bias().data.fill_(q)
    return algorithm


@pytest.mark.parametrize("q", [-2e7, -1e12])
@pytest.mark.parametrize("name", ["dqn", "cql", "bcq", "nfq", "qr_dqn", "iqn"])
def test_a_policy_of_diverged_values_plays_nothing_forbidden(name: str, q: float) -> None:
    states = torch.arange(float(WORLD.n_states))[:, None]
    mask = SOME.expand(WORLD.n_states, 3)
    with torch.no_grad():
        single = fallen(name, q).distribution(states[None], mask[None]).probs
        double = Mixture(fallen(name, q), 1)(states, mask)
    for probs in (single[0], double):
        assert not probs[:, 1].any() and torch.allclose(probs.sum(-1).float(), torch.ones(len(probs)))


def test_so_does_an_exported_one(tmp_path: Path) -> None:
    mask = SOME.expand(EPISODES.n_rows, 3).numpy()
    exported = export_checked(Mixture(fallen("cql", -2e7), 1), EPISODES, tmp_path)
    assert isinstance(exported, OnnxPolicy)
    probs = exported.probs(EPISODES.observation, mask)
    assert not probs[:, 1].any() and probs.sum(1) == pytest.approx(1.0)
