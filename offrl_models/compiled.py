"""Losses in machine code of their own: `torch.compile` writes it, fewer and larger operations where many small ones were."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.schema import InputError

Losses = Callable[[TransitionBatch], dict[str, Tensor]]


def compiled_losses(algorithm: Any, device: torch.device) -> Losses:
    """The losses of an algorithm, compiled as a whole when they are first computed; on CUDA each step is the launch of a graph.

    They raise InputError where there is no compiler for them, or they cannot be compiled.
    """
    torch.compiler.reset()  # what was compiled for another candidate would count against a limit
    graphs = device.type == "cuda"
    mode = "reduce-overhead" if graphs else "default"
    losses = torch.compile(algorithm.losses, fullgraph=True, dynamic=False, mode=mode)
    interval = getattr(algorithm.config, "policy_interval", 1)

    def found(batch: TransitionBatch) -> dict[str, Tensor]:
        # The number of a step is compiled in; whether the policy is due in it is all that tells steps apart.
        step = 0 if batch.step % interval == 0 else 1
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            each = losses(batch._replace(step=step))
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException  # importing it takes a second

            if not isinstance(error, TorchDynamoException):
                raise
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise InputError(
                f"the losses of {type(algorithm).__name__} cannot be compiled ({reason}); install a C++ compiler if there is none, "
                "or leave `training.compile` out."
            ) from error
        return {name: loss.clone() for name, loss in each.items()}  # a graph writes its next ones where these are

    return found
