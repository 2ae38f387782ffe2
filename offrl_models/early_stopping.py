"""When a model of the world has learned what there is to learn: judged by rows that it is not trained on."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.dynamics import Dynamics

PATIENCE = 5  # judgements without a better member after which a seed is done
BETTER = 0.01  # share by which an error has to fall to count as better


@runtime_checkable
class Stopping(Protocol):
    """What the learner asks after each chunk of gradient steps, and keeps in its checkpoints."""

    @property
    def done(self) -> bool: ...

    def judge(self) -> dict[str, list[float]]:
        """Look at the weights as they are now. What was found, one number per seed."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that later judgements depend on, under names that begin with `stop.`; overwritten in place where a training
        goes on."""
        ...


class EarlyStopping:
    """Keeps of every member the weights of its least error; a seed whose members no longer get better is left as it is then, so
    that it does not depend on how long others train beside it."""

    def __init__(self, model: Dynamics, holdout: TransitionBatch):
        self.model, self.holdout = model, holdout
        self.seeds, self.members = model.holdout_error.shape
        self.networks = {name: list(getattr(model, name).parameters()) for name in model.learning_rates()}
        self.best = {name: [each.detach().clone() for each in found] for name, found in self.networks.items()}
        device = holdout.reward.device
        self.error = {name: torch.full((len(model.seeds),), torch.inf, device=device) for name in self.networks}
        self.waited = torch.zeros(self.seeds, dtype=torch.long, device=device)

    @property
    def done(self) -> bool:
        """Whether every seed is."""
        return bool((self.waited >= PATIENCE).all())

    def tensors(self) -> dict[str, Tensor]:
        """Everything that later judgements depend on."""
        best = {f"stop.best.{name}.{i}": each for name, found in self.best.items() for i, each in enumerate(found)}
        error = {f"stop.error.{name}": each for name, each in self.error.items()}
        return {**best, **error, "stop.waited": self.waited}

    @torch.no_grad()
    def judge(self) -> dict[str, list[float]]:
        """Judge the weights as they are now. The errors on the rows held out, of each member of each seed."""
        running, gained, found = self.waited < PATIENCE, {}, self.model.errors(self.holdout)
        for name, error in found.items():
            better = (error < (1.0 - BETTER) * self.error[name]) & running.repeat_interleave(self.members)
            self.error[name] = torch.where(better, error, self.error[name])
            for kept, now in zip(self.best[name], self.networks[name], strict=True):
                kept[better] = now[better]
            gained[name] = better.unflatten(0, (self.seeds, self.members)).any(1)
        # Masks that follow from the observation are learned ever more surely, and would never let it end.
        waited = torch.where(gained["transition"], 0, self.waited + 1)
        self.waited = torch.where(running, waited, self.waited)
        return {f"{name}_holdout_error": error.tolist() for name, error in found.items()}

    @torch.no_grad()
    def keep_best(self) -> Float[Tensor, "seed member"]:
        """Give every member its best weights, and the model its elites. The least errors, infinite where a member exploded."""
        for name, found in self.networks.items():
            for kept, now in zip(self.best[name], found, strict=True):
                now.copy_(kept)
        model, error = self.model, self.error["transition"].unflatten(0, (self.seeds, self.members))
        model.holdout_error.copy_(error)
        model.elite.copy_(error.argsort(dim=1, stable=True)[:, : model.config.elites])
        one = self._of_each_seed()
        model.farthest.copy_(model.disagreement(model.predict(one.observation, one.action)).amax(-1))
        return error

    def _of_each_seed(self) -> TransitionBatch:
        """The rows held out, once for each seed and not for each member."""
        observation = type(self.holdout.observation)(*(part[:: self.members] for part in self.holdout.observation))
        return self.holdout._replace(observation=observation, action=self.holdout.action[:: self.members])
