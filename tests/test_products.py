"""Products by any of the ways that there are, against the same in double precision."""

import pytest
import torch
from torch import Tensor

from offrl_models import products
from offrl_models.products import affine

SHAPES = [  # seeds, rows, inputs, outputs
    (1, 64, 128, 96),  # for oneDNN
    (3, 64, 128, 96),
    (2, 64, 200, 70),  # narrower than deep
    (2, 2, 3, 4),  # too small for it
    (1, 64, 128, 1),
    (3, 64, 128, 1),
    (1, 64, 128, 6),  # few columns
    (3, 64, 128, 25),
    (2, 64, 6, 128),  # few columns of the gradient of x
]


def everything(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> list[Tensor]:
    """A product that looks at every place, its gradients, and theirs: the slopes of a function of them."""
    given = [each for each in (x, weight, bias) if each is not None]
    y = affine(x, weight, bias, relu=relu)
    first = torch.autograd.grad(torch.tanh(y).sum(), given, create_graph=True)
    second = torch.autograd.grad(sum((each.square().sum() for each in first), torch.zeros(())), given)
    return [y, *first, *second]


@pytest.mark.parametrize("narrow_transposed", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("biases", [0, 1, 64])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_all_their_gradients(
    shape: tuple[int, ...],
    relu: bool,
    biases: int,
    onednn: bool,
    narrow_transposed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "BY_ONEDNN", onednn and torch.backends.mkldnn.is_available())
    monkeypatch.setattr(products, "NARROW_TRANSPOSED", narrow_transposed)
    seeds, rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(1)
    sizes = [(seeds, rows, inputs), (seeds, inputs, outputs), (seeds, min(biases, rows), outputs)]
    given = [torch.randn(size, generator=generator, dtype=torch.float64) / inputs**0.25 for size in sizes]
    exact, found = (
        everything(x, weight, bias if biases else None, relu)
        for x, weight, bias in (
            [each.detach().to(kind).requires_grad_() for each in given] for kind in (torch.float64, torch.float32)
        )
    )
    assert found[2].is_contiguous()  # as optimizers like the gradient of a weight
    for right, other in zip(exact, found, strict=True):
        torch.testing.assert_close(other.double(), right, rtol=1e-4, atol=1e-5 * float(right.detach().abs().max()))


@pytest.mark.parametrize(
    ("maker", "family", "found"), [("AuthenticAMD", 26, 26), ("AuthenticAMD", 25, 25), ("GenuineIntel", 6, 0)]
)
def test_the_family_of_processors_of_amd(maker: str, family: int, found: int) -> None:
    one = f"processor\t: 0\nvendor_id\t: {maker}\ncpu family\t: {family}\nmodel\t\t: 17\n\n"
    assert products._amd_family(one * 2) == found
    assert not products._amd_family("processor\t: 0\nBogoMIPS\t: 243.75\n")  # as on ARM


def test_products_go_other_ways_only_where_that_pays() -> None:
    onednn = torch.backends.mkldnn.is_available()
    assert products._ways(26, "AVX512") == (onednn, True)
    assert products._ways(26, "AVX2") == products._ways(25, "AVX512") == (False, True)
    assert products._ways(0, "AVX512") == (False, False)


@pytest.mark.parametrize(("inputs", "outputs", "slope"), [(128, 1, False), (128, 6, False), (6, 128, True)])
def test_where_it_does_not_pay_a_narrow_product_is_left_to_torch(
    inputs: int, outputs: int, slope: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "BY_ONEDNN", False)
    x, weight = torch.randn(2, 64, inputs, requires_grad=slope), torch.randn(2, inputs, outputs).requires_grad_()
    for transposed in (True, False):
        monkeypatch.setattr(products, "NARROW_TRANSPOSED", transposed)
        assert ("BmmBackward" in str(affine(x, weight).grad_fn)) is not transposed


@pytest.mark.parametrize("transposed", [True, False])
def test_values_are_not_rounded_in_half_precision(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "NARROW_TRANSPOSED", transposed)
    with torch.autocast("cpu", torch.bfloat16):
        assert affine(torch.randn(2, 64, 128), torch.randn(2, 128, 1), torch.ones(2, 1, 1)).dtype == torch.float32


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_only_large_single_precision_products_go_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BY_ONEDNN", True)
    monkeypatch.setattr(products, "NARROW_TRANSPOSED", False)
    x, weight = torch.randn(2, 64, 128), torch.randn(2, 128, 96)
    assert "_Product" in str(affine(x, weight.requires_grad_()).grad_fn)
    assert "_Product" not in str(affine(x.double(), weight.double()).grad_fn)
    assert "_Product" not in str(affine(x[:, :16], weight).grad_fn)
    assert "_Product" not in str(affine(x[..., :64], weight[:, :64]).grad_fn)
    with torch.autocast("cpu", torch.bfloat16):
        assert affine(x, weight).dtype == torch.bfloat16
    graph = torch.export.export(Layer(weight), (x,)).graph
    assert not any("mkldnn" in str(node.target) or "_Product" in str(node.target) for node in graph.nodes)


class Layer(torch.nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight)


@pytest.mark.parametrize("rows", [2, 64])
def test_what_is_no_number_stays_none(rows: int) -> None:
    """Training stops a seed whose loss is NaN; a layer that made it 0 would hide that."""
    x = torch.zeros(1, rows, 128)
    x[0, 1, 5] = torch.nan
    assert affine(x, torch.randn(1, 128, 96), torch.zeros(1, 1, 96), relu=True)[0, 1].isnan().all()


def test_a_frozen_weight_costs_no_gradient() -> None:
    x, weight = torch.randn(1, 64, 128).requires_grad_(), torch.randn(1, 128, 96)
    affine(x, weight, torch.zeros(1, 1, 96)).sum().backward()
    assert x.grad is not None and weight.grad is None
