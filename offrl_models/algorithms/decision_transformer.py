"""Decision Transformer: imitates the log given the return that followed, and acts as what led to a great one did.

Chen, Lu, Rajeswaran et al. (2021), https://arxiv.org/abs/2106.01345; sizes, learning rate and weight decay of CORL and d3rlpy.
Differences from the paper: windows end, and do not begin, at a row drawn at random; returns are standardised over the log, not
divided by a number for each task; there is no dropout, layers start uniform and their norms have no scale and shift, and the
activation is d3rlpy's ReLU; over continuous actions the policy is a mixture of cut-off logistic densities, not one action.
CORL trains for 100,000 steps on batches of 64, with a warm-up of 10,000 and gradients clipped at 0.25; these are keys of
`training`, whose defaults are others and the same for all algorithms.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Float64, Int64
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.datasets.encoding import Encoded, Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch, Window
from offrl_models.datasets.views import looking_back
from offrl_models.distributions import Actions, Distribution, Space
from offrl_models.losses import weighted_mean
from offrl_models.schema import Episodes
from offrl_models.transformer import SequenceActor


@dataclass(frozen=True, kw_only=True)
class DecisionTransformerConfig:
    embedding: int = Field(default=128, ge=1)  # numbers of a token
    layers: int = Field(default=3, ge=1)
    heads: int = Field(default=1, ge=1)  # of the attention, which share the numbers of a token
    context: int = Field(default=20, ge=1)  # paper: K; rows that are looked at, the present one included
    max_steps: int = Field(
        default=1000, ge=1
    )  # of an episode that are told apart; later ones count as the last of them
    learning_rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    target_return: float | None = None  # undiscounted, of a whole episode; None: the greatest in the log

    @field_validator("heads")
    @classmethod
    def _heads_share_the_embedding(cls, value: int, info: Any) -> int:
        size = info.data.get("embedding", value)
        if size % value:
            raise ValueError(f"a divisor of embedding, {size}, is needed")
        return value


class DecisionTransformer(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete", "continuous")
    targets: ClassVar[dict[str, str]] = {}
    needs_history: ClassVar[bool] = True
    target_update = (1.0, 1)
    draws = 0
    target_return: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, config: DecisionTransformerConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]):
        super().__init__()
        self.config, self.context, self.weight_decay = config, config.context, config.weight_decay
        shape = {"size": config.embedding, "layers": config.layers, "heads": config.heads}
        self.policy = SequenceActor(seeds, encoder, actions, max_steps=config.max_steps, **shape)
        for name in ("target_return", "mean", "scale"):  # no numbers until a log was looked at
            self.register_buffer(name, torch.tensor(torch.nan, dtype=torch.float64))

    def look_at(self, episodes: Episodes) -> None:
        """Takes the scale of returns, and the target where none was set, from the log that is trained on."""
        mean, spread = float(episodes.reward_to_go.mean()), float(episodes.reward_to_go.std())
        self.mean.fill_(mean)
        self.scale.fill_(spread if spread > 1e-6 * abs(mean) else 1.0)  # of equal returns there is rounding left
        best = float(episodes.reward_to_go[episodes.offsets[:-1]].max())
        self.aim_at(best if self.config.target_return is None else self.config.target_return)

    def aim_at(self, target_return: float) -> None:
        """Acts for another return from now on; what was learned serves for any."""
        self.target_return.fill_(target_return)

    def learning_rates(self) -> dict[str, float]:
        return {"policy": self.config.learning_rate}

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed: the mean over all known rows of all windows."""
        window = batch.window
        assert window is not None
        log_prob = self.policy(window._replace(return_to_go=self.standard(window.return_to_go))).log_prob(window.action)
        known = window.known.to(log_prob.dtype).flatten(1)
        return {"policy": weighted_mean(known, -log_prob.flatten(1), self_normalized=True)}

    def standard(self, return_to_go: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """In units of the log's."""
        return ((return_to_go - self.mean) / self.scale).to(self.policy.out.weight.dtype)

    def given(
        self,
        observation: Float[Tensor, "seed batch context columns"],
        past_action: Int64[Tensor, "seed batch context"] | Float[Tensor, "seed batch context dimensions"],
        earned: Float64[Tensor, "seed batch context"],
        step: Int64[Tensor, "seed batch"],
        mask: Bool[Tensor, "seed batch actions"] | None,
    ) -> Distribution:
        """The policy at the last row of windows, [seed, batch]; `history.HistoryMixture.forward` says what they hold."""
        _, known, step_of_each = looking_back(step, observation.shape[2])
        wanted = self.standard(self.target_return - earned)
        allowed = None if mask is None else mask.unsqueeze(2)
        return self.policy.at_last(Window(observation, past_action, wanted, step_of_each, known, allowed))

    def distribution(self, observation: Observation, mask: Tensor | None) -> Distribution:
        """The policy, [seed, batch], at the first decision of an episode, when nothing was done or earned yet."""
        seen = observation if isinstance(observation, Encoded) else self.policy.encode(observation)
        first = torch.zeros((*seen.numeric.shape[:2], 1), dtype=torch.long, device=seen.numeric.device)
        wanted = self.standard(self.target_return - first)
        allowed = None if mask is None else mask.unsqueeze(2)
        row = Encoded(*(part.unsqueeze(2) for part in seen))
        return self.policy.at_last(Window(row, None, wanted, first, first == 0, allowed))
