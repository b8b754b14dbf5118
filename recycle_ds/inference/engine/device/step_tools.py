"""What the pieces of a step share: the model, the cache, the fields, and small computations on them.

Shapes: T tokens, R rows with logits, N sequences, X positions of each, V token ids, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recycle_ds.inference.engine.cache import Cache
from recycle_ds.inference.engine.device import adjusting, choosing
from recycle_ds.inference.engine.device.adjusting import Amended, Counts, Penalties
from recycle_ds.inference.engine.device.fields import MOST_DEPTH, MOST_ROWS, MOST_SEQUENCES
from recycle_ds.inference.engine.device.paged import PagedAttention, PagedTokens, Seen
from recycle_ds.inference.engine.device.step_shape import StepShape
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.speculation import noise
from recycle_ds.inference.speculation.tree import BRANCH, MAX_WIDTH
from recycle_ds.inference.speculation.vocabulary import Vocabulary

FULL, DRAFT = 0, 1
"""The vocabularies: of the full model and of drafts."""


class Results:
    """What the pieces pass to each other and to the host, by name, in static buffers of the largest size."""

    def __init__(self, weights: StageWeights) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=weights.device)

        self.chosen_states = zeros(MOST_ROWS, weights.width, dtype=weights.dtype)
        self.module_states = zeros(MOST_SEQUENCES, weights.width, dtype=weights.dtype)
        self.accepted, self.count, self.token = (zeros(MOST_SEQUENCES) for _ in range(3))
        """Of every sequence: accepted nodes as bits, their number, and the token after them."""
        self.limits = zeros(MOST_SEQUENCES)
        """Drafts to make for every sequence, one after the other."""
        self.chain_ids = zeros(MOST_DEPTH * MOST_SEQUENCES)
        self.chain_confidences = zeros(MOST_DEPTH * MOST_SEQUENCES, dtype=torch.float64)
        nodes = MOST_DEPTH * MOST_SEQUENCES * MAX_WIDTH
        self.beams = zeros(nodes)
        """By depth, sequence and place: the child of the beam before, as its number there; -1 for none."""
        self.child_ids = zeros(nodes * BRANCH)
        self.child_confidences = zeros(nodes * BRANCH, dtype=torch.float64)


class StepTools:
    """One model's step. `fields` are those of fields.py on the device."""

    def __init__(
        self,
        weights: StageWeights,
        cache: Cache,
        vocabularies: tuple[Vocabulary, Vocabulary],
        amended: tuple[Amended, Amended],
        fields: dict[str, Tensor],
        attend: PagedAttention,
        scratch: int,
    ) -> None:
        """vocabularies, amended: of the full model and of drafts. scratch: a block that padding writes to."""
        self.weights, self.cache, self.attend = weights, cache, attend
        self.vocabularies, self.amended = vocabularies, amended
        self.ids = [one.ids(weights.device) for one in vocabularies]
        self.fields, self.size, self.scratch = fields, cache.block_size, scratch * cache.block_size
        self.results = Results(weights)

    def tables(self, shape: StepShape) -> Tensor:
        return self.fields["tables"][:, : shape.width]

    def slots(self, shape: StepShape, at_NX: Tensor, used_NX: Tensor) -> Tensor:
        """Slots of positions of every sequence [N, X]; the scratch block's where they are not used."""
        block_NX = (at_NX // self.size).clamp(0, shape.width - 1)
        slots_NX = self.tables(shape)[: len(at_NX)].gather(1, block_NX) * self.size + at_NX % self.size
        return torch.where(used_NX, slots_NX, self.scratch)

    def slots_of(self, shape: StepShape, sequences_T: Tensor, at_T: Tensor, used_T: Tensor) -> Tensor:
        """The same for one position of a sequence in every row [T]."""
        block_T = (at_T // self.size).clamp(0, shape.width - 1)
        slots_T = self.tables(shape)[sequences_T, block_T] * self.size + at_T % self.size
        return torch.where(used_T, slots_T, self.scratch)

    def counts(self, shape: StepShape, known_N: Tensor, which: int) -> Counts:
        """Counts of the tokens before known_N. which: vocabulary."""
        at_L = torch.arange(shape.width * self.size, device=known_N.device)
        slots_NL = self.tables(shape)[: shape.sequences][:, at_L // self.size] * self.size + at_L % self.size
        starts_N = self.fields["prompt_tokens"][: shape.sequences]
        return adjusting.counted(self.cache.tokens[slots_NL], starts_N, known_N, self.vocabularies[which])

    def penalties(self, shape: StepShape, known_N: Tensor) -> Penalties:
        at = {name: self.fields[name][: shape.sequences] for name in ("ends_from", "prompt_tokens", "places")}
        repetition, presence, frequency = (
            self.fields[name][: shape.sequences].float() for name in ("repetition", "presence", "frequency")
        )
        new_tokens_N = known_N - at["prompt_tokens"]
        return Penalties(repetition, presence, frequency, at["ends_from"], new_tokens_N, at["places"])

    def chosen(self, shape: StepShape, logits_RV: Tensor, sequences_R: Tensor, places_R: Tensor, which: int) -> Tensor:
        """The token of every row. places_R: its position. which: vocabulary."""
        if not shape.sampled:
            return choosing.likeliest(logits_RV, self.ids[which])
        at = {name: self.fields[name][sequences_R] for name in ("temperature", "top_k", "top_p", "min_p", "seeds")}
        keys_R = noise.keys(at["seeds"], places_R, noise.TOKEN)
        floats = (at["temperature"].float(), at["top_k"], at["top_p"].float(), at["min_p"].float())
        return choosing.choose(logits_RV, self.ids[which], choosing.Rows(*floats, keys_R, shape.limited))

    def module(
        self,
        shape: StepShape,
        states_TD: Tensor,
        ids_T: Tensor,
        slots_T: Tensor,
        positions_T: Tensor,
        seen: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> Tensor:
        """A call of the module. positions_T: for the rotary embedding; of unused rows, any. seen: sequences, roots, bits and
        ends."""
        assert self.weights.module is not None
        rows = Seen(*seen, self.tables(shape), 1, self.size)
        tokens = PagedTokens(
            self.cache.module_keys_values, (), slots_T, self.size,
            positions_T=positions_T.clamp(0, self.weights.rotary.max_positions - 1), seen=rows, attend=self.attend,
        )  # fmt: skip
        return self.weights.module(states_TD, self.weights.embed(ids_T), tokens)
