"""Compiles losses and prints how that went; a program of its own, for the checks of shapes in tests would be compiled as well."""

import dataclasses
import json
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters
from torch._inductor import config

from offrl_models import products
from offrl_models.algorithms import make_config
from offrl_models.datasets.encoding import Encoder
from offrl_models.ope.fqe import FQEConfig
from offrl_models.ope.worlds import random_world
from offrl_models.products import affine
from offrl_models.schema import Feature, InputError
from offrl_models.training import fit, fit_fqe
from tests.test_covered_world import Tabled

WORLD = random_world(3, 3, 3, 0.9, seed=7)
EPISODES = dataclasses.replace(WORLD.simulate(100, seed=1), features=(Feature("state", WORLD.n_states),))


def learned(steps: int, **how: Any) -> list[torch.Tensor]:
    """Weights of an algorithm that freezes a critic."""
    settings = make_config("td3_bc", {"hidden": (128, 128), "learning_rate": 0.001, "policy_interval": 1})
    encoder = Encoder(EPISODES.features)
    algorithm, _ = fit("td3_bc", settings, EPISODES, encoder, seeds=[0, 1], gradient_steps=steps, batch_size=128, **how)
    return [each.detach() for each in algorithm.parameters() if each.numel()]


def valued(steps: int, compiled: bool = False) -> list[torch.Tensor]:
    """What fitted Q evaluation makes of a policy, from first observations on."""
    config = FQEConfig(hidden=(128, 128), batch_size=128, gradient_steps=steps, members=2, compile=compiled)
    policy = Tabled(WORLD.optimal())
    found = fit_fqe(config, Encoder(EPISODES.features), [policy], EPISODES, EPISODES, seed=0)
    return [torch.as_tensor(found.initial)]


def largest(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def slopes_apart(seeds: int, inputs: int, outputs: int) -> float:
    """Of the gradient of a loss that holds the slope of a layer, as that of EDAC does, relative to the largest one."""
    x, weight = (torch.randn(size).requires_grad_() for size in [(seeds, 64, inputs), (seeds, inputs, outputs)])

    def of_slopes(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value = torch.tanh(affine(x, weight, torch.zeros(seeds, 1, outputs), relu=True) / inputs**0.5)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (x, weight))

    found = torch.compile(of_slopes, fullgraph=True, backend="aot_eager")(x, weight)
    wanted = of_slopes(x, weight)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    products.NARROW_TRANSPOSED = True  # by which a compiler leaves gradients transposed in memory
    try:
        with config.patch({"cpp.cxx": (None, "/no/such/compiler")}):
            refused = learned(1, compile=True) and "nothing"
    except InputError as error:
        refused = str(error)
    counters.clear()
    plain, compiled = learned(20), learned(20, compile=True)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    found = {"refused": refused, "apart": largest(plain, compiled), "moved": largest(plain, learned(1))}
    products.NARROW_TRANSPOSED = False
    values = valued(20)
    found |= {"values_apart": largest(values, valued(20, True)), "values_moved": largest(values, valued(1))}
    slopes, by_onednn = [], []
    onednn = torch.backends.mkldnn.is_available()
    for products.BY_ONEDNN, products.NARROW_TRANSPOSED in ((False, True), (onednn, True), (False, False)):
        torch.compiler.reset()
        with patch.object(products, "_by_onednn", wraps=products._by_onednn) as multiply:
            torch.compile(affine, fullgraph=True, backend="aot_eager")(torch.ones(1, 64, 128), torch.ones(1, 128, 96))
        by_onednn.append(multiply.call_count)
        slopes += [slopes_apart(2, 128, 6), slopes_apart(2, 6, 128), slopes_apart(1, 128, 96), slopes_apart(3, 128, 96)]
        slopes += [slopes_apart(1, 128, 1), slopes_apart(1, 96, 64)]
    print(json.dumps({**found, "graphs": graphs, "breaks": breaks, "slopes": slopes, "by_onednn": by_onednn}))
