"""Losses of a batch and their gradients: operation by operation, or in machine code that `torch.compile` writes of all of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offrl_models import products, storage
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.schema import InputError

Losses = Callable[[TransitionBatch], dict[str, Tensor]]


def plain_losses(algorithm: Any) -> Losses:
    """The losses of an algorithm, which leave the gradients of their sum in its parameters."""

    def found(batch: TransitionBatch) -> dict[str, Tensor]:
        losses = algorithm.losses(batch)
        torch.cat(list(losses.values())).sum().backward()  # nothing that the trainer does around it is of use here
        return losses

    return found


def compiled_losses(algorithm: Any, parameters: Sequence[Tensor], device: torch.device) -> Losses:
    """The same, compiled as one whole when it is first computed; on CUDA each step is the launch of a graph.

    They raise InputError where there is no compiler for them, or they cannot be compiled.
    """
    from torch._dynamo import config  # importing it takes a second

    config.trace_autograd_ops = True  # gradients within what is compiled
    torch.compiler.config.cache_key_tag = storage.sha256_file(Path(products.__file__))  # its gradients count, too
    torch.compiler.reset()  # what was compiled for another candidate would count against a limit
    graphs = device.type == "cuda"

    def with_gradients(batch: TransitionBatch) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
        losses = algorithm.losses(batch)
        found = torch.autograd.grad(torch.cat(list(losses.values())).sum(), parameters, allow_unused=True)
        gradients = tuple(each if each is None else each.contiguous() for each in found)  # as backward() leaves them
        return {name: loss.detach() for name, loss in losses.items()}, gradients

    mode = "reduce-overhead" if graphs else "default"
    compute = torch.compile(with_gradients, fullgraph=True, dynamic=False, mode=mode)
    interval = getattr(algorithm.config, "policy_interval", 1)

    def found(batch: TransitionBatch) -> dict[str, Tensor]:
        # The number of a step is compiled in; whether the policy is due in it is all that tells steps apart.
        step = 0 if batch.step % interval == 0 else 1
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            losses, gradients = compute(batch._replace(step=step))
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, TorchDynamoException):
                raise
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise InputError(
                f"the losses of {type(algorithm).__name__} cannot be compiled ({reason}); install a C++ compiler if there is none, "
                "or leave `compile` out."
            ) from error
        for each, gradient in zip(parameters, gradients, strict=True):
            each.grad = gradient
        return {name: loss.clone() for name, loss in losses.items()}  # a graph writes its next ones where these are

    return found
