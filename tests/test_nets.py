"""Networks: several vectors for one observation are looked at as each would be alone."""

import pytest
import torch
from torch import Tensor

from offrl_models import nets
from offrl_models.datasets.encoding import Encoder
from offrl_models.nets import JointMLP
from tests.conftest import codes

SEEDS, ROWS, DRAWS, DIMENSIONS = 2, 50, 7, 3


def gradients(network: JointMLP, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(torch.tanh(value).square().sum(), [*network.parameters()]))


@pytest.mark.parametrize("draws_of_a_tile", [1, 3, 7, 100])
def test_several_vectors_are_each_looked_at_alone(draws_of_a_tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nets, "TILE", draws_of_a_tile * ROWS)
    network = JointMLP([4, 9], "q", Encoder(codes(None, 3, None)), (16, 8), DIMENSIONS, 2).double()
    generator = torch.Generator().manual_seed(0)
    observation = torch.rand(SEEDS, ROWS, 3, generator=generator, dtype=torch.float64)
    observation[..., 1] = torch.randint(3, (SEEDS, ROWS), generator=generator)
    vector = torch.rand(SEEDS, ROWS, DRAWS, DIMENSIONS, generator=generator, dtype=torch.float64)
    found = network(observation, vector)
    alone = torch.stack([network(observation, vector[:, :, draw]) for draw in range(DRAWS)], 2)
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)
    for mine, wanted in zip(gradients(network, found), gradients(network, alone), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)
