"""A causal transformer over the rows of an episode, with a leading seed axis: a policy that looks at what was before."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from offrl_models.datasets.encoding import Encoded, Encoder
from offrl_models.datasets.transitions import Window
from offrl_models.distributions import Actions, Distribution, head_of
from offrl_models.nets import Box, ObservationLayer, SeedLinear, initial_weights


class SeedEmbedding(nn.Module):
    """One row of each seed's own table for each number."""

    first_row: Tensor

    def __init__(self, seeds: Sequence[int], name: str, rows: int, size: int):
        super().__init__()
        self.weight = initial_weights(seeds, name + ".t", (rows, size), 1)
        self.register_buffer("first_row", torch.arange(len(seeds))[:, None, None] * rows, persistent=False)

    def forward(self, row: Int64[Tensor, "seed batch context"]) -> Float[Tensor, "seed batch context size"]:
        return F.embedding(row + self.first_row, self.weight.flatten(0, 1))


class VectorEmbedding(nn.Module):
    """A linear map of continuous actions, whose dimensions it brings to run from -1 to 1."""

    def __init__(self, seeds: Sequence[int], name: str, actions: Actions, size: int):
        super().__init__()
        assert not isinstance(actions, int)
        self.box, self.linear = Box(actions), SeedLinear(seeds, name, len(actions), size)

    def forward(
        self, vector: Float[Tensor, "seed batch context dimensions"]
    ) -> Float[Tensor, "seed batch context size"]:
        return self.linear(self.box.unit(vector).flatten(1, 2)).unflatten(1, vector.shape[1:3])


class Block(nn.Module):
    """Attention, then two layers; each reads what is standardised and adds to it: Radford et al. (2019), GPT-2.

    A learned scale and shift of what is standardised would be undone by the linear layer that follows.
    """

    def __init__(self, seeds: Sequence[int], name: str, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.look = SeedLinear(seeds, name + "l", size, 3 * size, bias=False)  # that of keys would have no gradient
        self.tell = SeedLinear(seeds, name + "t", size, size)
        self.widen = SeedLinear(seeds, name + "w", size, 4 * size)
        self.narrow = SeedLinear(seeds, name + "n", 4 * size, size)

    def forward(
        self, x: Float[Tensor, "seed positions size"], visible: Bool[Tensor, "sequences 1 tokens tokens"]
    ) -> Float[Tensor, "seed positions size"]:
        """`positions` are the tokens of one sequence after the other."""
        seeds, tokens = x.shape[0], visible.shape[-1]
        asked = self.look(F.layer_norm(x, x.shape[-1:])).unflatten(-1, (3, self.heads, -1))
        query, key, value = asked.unflatten(1, (-1, tokens)).flatten(0, 1).permute(2, 0, 3, 1, 4).unbind()
        heard = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        x = x + self.tell(heard.transpose(1, 2).flatten(2).unflatten(0, (seeds, -1)).flatten(1, 2))
        return x + self.narrow(torch.relu(self.widen(F.layer_norm(x, x.shape[-1:]))))


class Parts(NamedTuple):
    """What a row of a window is to the transformer: as many tokens, in this order."""

    wanted: Tensor
    seen: Tensor
    done: Tensor


class SequenceActor(nn.Module):
    """The policy at every row of a window, of what is wanted, seen and done up to there: Chen et al. (2021), figure 1."""

    def __init__(
        self,
        seeds: Sequence[int],
        encoder: Encoder,
        actions: Actions,
        *,
        size: int,
        layers: int,
        heads: int,
        max_steps: int,
    ):
        super().__init__()
        self.encode, self.head, self.max_steps = encoder, head_of(actions), max_steps
        self.wanted, self.seen = SeedLinear(seeds, "dtr", 1, size), ObservationLayer(seeds, "dts", encoder, size)
        if isinstance(actions, int):
            self.done = SeedEmbedding(seeds, "dta", actions, size)
        else:
            self.done = VectorEmbedding(seeds, "dta", actions, size)
        self.time = SeedEmbedding(seeds, "dtt", max_steps, size)
        self.blocks = nn.ModuleList(Block(seeds, f"dt{i}", size, heads) for i in range(layers))
        self.out = SeedLinear(seeds, "dto", size, self.head.outputs)

    def tokens(self, window: Window) -> Float[Tensor, "seed batch tokens size"]:
        """Standardised; those of rows that are not known are 0."""
        shape = window.known.shape[1:]
        seen = window.observation if isinstance(window.observation, Encoded) else self.encode(window.observation)
        parts = Parts(
            self.wanted(window.return_to_go.flatten(1).unsqueeze(-1)).unflatten(1, shape),
            self.seen(Encoded(*(part.flatten(1, 2) for part in seen))).unflatten(1, shape),
            torch.zeros(()) if window.action is None else self.done(window.action),
        )
        time = self.time(window.step.clamp(max=self.max_steps - 1))
        each = torch.stack([part + time for part in parts], 3)
        each = torch.where(window.known[..., None, None], F.layer_norm(each, each.shape[-1:]), 0.0)
        return each.flatten(2, 3)

    def outputs(self, window: Window) -> Float[Tensor, "seed batch context outputs"]:
        """What the head makes the policy of, at the observation of every row."""
        x = self.tokens(window)
        each = torch.arange(x.shape[2], device=x.device)
        before, itself = each[:, None] >= each, each[:, None] == each
        known = window.known.repeat_interleave(len(Parts._fields), -1).flatten(0, 1)
        visible = (before & known[:, None, :] | itself).unsqueeze(1)  # what sees nothing at all would be no number
        flat = x.flatten(1, 2)
        for block in self.blocks:
            flat = block(flat, visible)
        at_seen = flat.unflatten(1, x.shape[1:3])[:, :, Parts._fields.index("seen") :: len(Parts._fields)]
        found = self.out(F.layer_norm(at_seen, at_seen.shape[-1:]).flatten(1, 2)).unflatten(1, at_seen.shape[1:3])
        return found.float() if found.dtype == torch.bfloat16 else found

    def forward(self, window: Window) -> Distribution:
        """The policy at every row, [seed, batch, context]."""
        return self.head(self.outputs(window), window.mask)

    def at_last(self, window: Window) -> Distribution:
        """The policy at the last row, [seed, batch]."""
        return self.head(self.outputs(window)[:, :, -1], None if window.mask is None else window.mask[:, :, -1])
