"""Products of matrices with a leading seed axis, each by the fastest way that torch has for its shape.

In single precision torch multiplies by MKL, which leaves AVX-512 to processors of its own maker. oneDNN, which torch brings too,
has it on all of them and is as exact: twice as fast on an AMD EPYC with units of 512 bits (Zen 5), and a little slower on one that
takes them in two halves (Zen 4). What is small or shallow gains nothing from it.

On AMD's a product of few columns takes MKL up to five times as long as the transposed one of few rows (on Zen 3: 122 us of
256 x 256 and 256 x 6, and 25), so that is what is asked for there: in the last layer of a policy, for the gradient of its weights,
and for that of actions with few dimensions. On an Intel with AVX-512 it was the other way round (18 us and 139), and processors of
no other maker were tried: there it is left to torch.
"""

import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

DEEP = 64  # numbers in each sum of a product beyond which a call of oneDNN pays
MANY = 2**18  # and multiplications of one seed
NARROW = 32  # columns up to which a product is computed as the transposed one
SOME = 2**15  # multiplications of one seed from which that pays
ZEN_5 = 26  # the family of AMD's first processors with units of 512 bits


def _amd_family(processors: str) -> int:
    """Of these processors, as /proc/cpuinfo tells of them; 0 where they are of another maker."""
    family = re.search(r"^vendor_id\s*: AuthenticAMD\ncpu family\s*: (\d+)$", processors, re.MULTILINE)
    return int(family[1]) if family else 0


def _ways(family: int, units: str) -> tuple[bool, bool]:
    """Whether large products go to oneDNN, for MKL leaves half of the units unused, and whether narrow ones are transposed."""
    return torch.backends.mkldnn.is_available() and units == "AVX512" and family >= ZEN_5, family > 0


_PROCESSORS = Path("/proc/cpuinfo")  # of Linux; elsewhere it is left to torch
_FAMILY = _amd_family(_PROCESSORS.read_text()) if _PROCESSORS.exists() else 0
BY_ONEDNN, NARROW_TRANSPOSED = _ways(_FAMILY, torch.backends.cpu.get_cpu_capability())


def affine(
    x: Float[Tensor, "seed batch inputs"],
    weight: Float[Tensor, "seed inputs outputs"],
    bias: Float[Tensor, "seed #batch outputs"] | None = None,
    *,
    relu: bool = False,
) -> Float[Tensor, "seed batch outputs"]:
    """x @ weight + bias, which may be a row for all or one for each, and what is below 0 made 0 where that is asked.

    It can be differentiated as often as one likes.
    """
    if x.device.type == "cpu" and not torch.compiler.is_exporting():
        # MKL may take five times as long where there are several seeds, and half precision would round values.
        if weight.shape[2] == 1 and (NARROW_TRANSPOSED or torch.is_autocast_enabled("cpu")):
            return _finished((x * weight.mT).sum(-1, keepdim=True), bias, relu)
        if torch.compiler.is_compiling():  # bias and ReLU become one pass with what follows
            return _finished(_compiled(x, weight), bias, relu)
        if _suits_onednn(x, weight) or _has_narrow_side(x, weight):
            if not torch.is_grad_enabled():
                return _multiplied(x, weight, bias, relu)
            return _Product.apply(x, weight, bias, relu)  # pyright: ignore[reportReturnType]
    product = torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)
    return product.relu_() if relu else product


def _finished(product: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """With bias and ReLU, in passes of their own."""
    product = product if bias is None else product + bias
    return torch.relu(product) if relu else product


def _in_single_precision(x: Tensor, weight: Tensor) -> bool:
    """Products in half precision torch gives to oneDNN itself."""
    return x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    _, inputs, outputs = weight.shape
    return BY_ONEDNN and inputs > DEEP and x.shape[1] * inputs * outputs > MANY and _in_single_precision(x, weight)


def _is_narrow(x: Tensor, weight: Tensor) -> bool:
    some = x.shape[1] * weight.shape[1] * weight.shape[2] > SOME
    return NARROW_TRANSPOSED and weight.shape[2] <= NARROW and some


def _has_narrow_side(x: Tensor, weight: Tensor) -> bool:
    """Whether the product, or the gradient of x where one is wanted, has few columns."""
    of_x = x.requires_grad and torch.is_grad_enabled() and _is_narrow(x, weight.mT)
    return (_is_narrow(x, weight) or of_x) and _in_single_precision(x, weight)


def _by_mkl(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(weight.mT, x.mT).mT.contiguous() if _is_narrow(x, weight) else torch.bmm(x, weight)


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    if _suits_onednn(x, weight):
        return _by_onednn(x, weight, bias, relu)
    return _finished(_by_mkl(x, weight), bias, relu)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    one = bias is not None and bias.shape[1] == 1  # for all rows
    biases = bias.squeeze(1) if bias is not None and one else [None] * len(x)
    multiply: Any = torch.ops.mkldnn._linear_pointwise.default
    each = [multiply(x[seed], weight[seed].t(), biases[seed], "none", [], "") for seed in range(len(x))]
    product = torch.stack(each) if len(each) > 1 else each[0].unsqueeze(0)
    return _finished(product, None if one else bias, relu)  # oneDNN's own ReLU would make NaN 0


@torch.library.custom_op("offrl::product", mutates_args=(), device_types="cpu")
def _as_one_step(x: Tensor, weight: Tensor) -> Tensor:
    """oneDNN's product as one step of what is compiled, which torch's compiler has for constant weights alone."""
    return _by_onednn(x, weight, None, relu=False)


@_as_one_step.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[2])


def _kept(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    for_x, for_weight = ctx.needs_input_grad
    return _compiled(gradient, weight.mT) if for_x else None, _compiled(x.mT, gradient) if for_weight else None


_as_one_step.register_autograd(_gradients, setup_context=_kept)


def _compiled(x: Tensor, weight: Tensor) -> Tensor:
    return _as_one_step(x, weight) if _suits_onednn(x, weight) else _by_mkl(x, weight)


class _Product(torch.autograd.Function):
    """Not for what is compiled: there gradients of its gradients would lack a part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        product = _multiplied(x, weight, bias, relu)
        ctx.save_for_backward(x, weight, product if relu else None)
        ctx.shared = bias is not None and bias.shape[1] < x.shape[1]
        return product

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, above = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        if above is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, above, 0.0)
        of_weight = None
        if for_weight:  # the wider side of a product comes last
            wide = weight.shape[2] >= weight.shape[1]
            of_weight = affine(x.mT, gradient) if wide else affine(gradient.mT, x).mT.contiguous()
        return (
            affine(gradient, weight.mT) if for_x else None,
            of_weight,
            (gradient.sum(1, keepdim=True) if ctx.shared else gradient) if for_bias else None,
            None,
        )
