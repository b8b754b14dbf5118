"""The pieces of a step that draft: see pieces.py. Each depth is one call of the module, and none waits for the one before.

Shapes: T rows, N sequences, B nodes of a beam, K children of a node, J drafts before a row, V token ids, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recycle_ds.inference.engine.device import adjusting, growing
from recycle_ds.inference.engine.device.step_shape import StepShape
from recycle_ds.inference.engine.device.step_tools import DRAFT, StepTools
from recycle_ds.inference.speculation import noise
from recycle_ds.inference.speculation.tree import BRANCH


class DraftPieces:
    """Chains and trees."""

    def __init__(self, tools: StepTools) -> None:
        self._tools = tools

    def chain(self, shape: StepShape) -> None:
        """The module drafts chains, for the sequences that want one."""
        tools = self._tools
        fields, results, end = tools.fields, tools.results, shape.sequences
        each_N = torch.arange(end, device=results.count.device)
        index_N = fields["known"][:end] + results.count[:end]
        limits_N = torch.where(fields["widths"][:end] > 0, 0, results.limits[:end])
        states_ND, ids = results.module_states[:end], list[Tensor]()
        for depth in range(shape.chain):
            logits_NV = self._draft_logits(shape, states_ND, each_N, index_N, torch.stack(ids, 1) if ids else None)
            ids.append(tools.chosen(shape, logits_NV, each_N, index_N + 1 + depth, DRAFT))
            kept = slice(depth * end, (depth + 1) * end)
            results.chain_ids[kept] = ids[-1]
            results.chain_confidences[kept] = self._confidence(states_ND, logits_NV)
            if depth + 1 < shape.chain:
                own_N = index_N + 1 + depth
                used_N = limits_N > depth + 1
                slots_N = tools.slots_of(shape, each_N, own_N, used_N)
                seen = (each_N, own_N, torch.zeros_like(own_N), torch.where(used_N, own_N + 1, 0))
                states_ND = tools.module(shape, states_ND, ids[-1], slots_N, own_N - 1, seen)

    def tree(self, shape: StepShape) -> None:
        """The module grows trees, for the sequences that want one."""
        tools = self._tools
        fields, results, end, width = tools.fields, tools.results, shape.sequences, shape.beam
        device, draft_ids_V = results.count.device, tools.ids[DRAFT]
        index_N, widths_N = fields["known"][:end] + results.count[:end], fields["widths"][:end]
        limits_N = torch.where(widths_N > 0, results.limits[:end], 0)
        # the first depth has one node: the latest known token
        states_TD, each_T = results.module_states[:end], torch.arange(end, device=device)
        beam, paths_TJ = growing.first_beam(end, device), None
        greedy_N, even_N = fields["temperature"][:end] == 0, fields["nearly_greedy"][:end] > 0
        inverse_N = torch.where(greedy_N, 1.0, 1 / fields["temperature"][:end]).float()
        for depth in range(1, shape.depth + 1):
            now = beam.chances_NB.shape[1]
            logits_TV = self._draft_logits(shape, states_TD, each_T, index_N, paths_TJ) * inverse_N[each_T][:, None]
            if shape.sampled:
                keys_T = noise.keys(fields["seeds"][:end], index_N + depth, noise.TOKEN)[each_T]
                clocks_TV = noise.exponentials(keys_T, draft_ids_V)
                logits_TV = torch.where(even_N[each_T][:, None], logits_TV, logits_TV - clocks_TV.log())
            count = min(BRANCH, logits_TV.shape[1])
            values_TK, rows_TK = logits_TV.topk(count, dim=-1)
            ids_TK = draft_ids_V[rows_TK]
            probabilities_TK = (values_TK - logits_TV.logsumexp(-1, keepdim=True)).exp()
            layer_T = tools.weights.module.confidence(states_TD) if tools.weights.module is not None else None
            layer_NB = None if layer_T is None else layer_T.view(end, now)
            values_NBK = growing.confidences(probabilities_TK.view(end, now, count), layer_NB, greedy_N)
            self._keep_children(depth, ids_TK.view(end, now, count), values_NBK, width)
            if depth == shape.depth:
                return
            open_N = limits_N > depth
            ended_NBK = (ids_TK.view(end, now, count, 1) == fields["end_ids"][:end, None, None]).any(-1)
            picked_NB, beam = growing.next_beam(
                beam, values_NBK, ended_NBK, open_N, widths_N, depth, min(width, now * count)
            )
            self._keep_beam(depth, picked_NB, count, width)
            chosen_NB, now = picked_NB.clamp_min(0), picked_NB.shape[1]
            ids_T = ids_TK.view(end, -1).gather(1, chosen_NB).flatten()
            before_T = (chosen_NB // count + torch.arange(end, device=device)[:, None] * (len(each_T) // end)).flatten()
            if shape.adjusted:
                own_T1 = ids_T[:, None]
                paths_TJ = own_T1 if paths_TJ is None else torch.cat((paths_TJ[before_T], own_T1), dim=1)
            each_T = torch.arange(end, device=device).repeat_interleave(now, output_size=end * now)
            place_B = torch.arange(now, device=device)
            own_NB = index_N[:, None] + 1 + (depth - 1) * widths_N[:, None] + place_B
            used_NB = beam.chances_NB > 0
            slots_NB = tools.slots(shape, own_NB, used_NB)
            seen = (
                each_T, index_N[each_T], beam.bits_NB.flatten(), torch.where(used_NB, own_NB + 1, 0).flatten()
            )  # fmt: skip
            positions_T = (index_N + depth - 1)[each_T]
            states_TD = tools.module(shape, states_TD[before_T], ids_T, slots_NB.flatten(), positions_T, seen)

    def _keep_children(self, depth: int, ids_NBK: Tensor, confidences_NBK: Tensor, width: int) -> None:
        sequences, now, count = ids_NBK.shape
        first, size = (depth - 1) * sequences * width * BRANCH, sequences * width * BRANCH
        for kept, values in (
            (self._tools.results.child_ids, ids_NBK),
            (self._tools.results.child_confidences, confidences_NBK),
        ):
            room = kept[first : first + size].view(sequences, width, BRANCH)
            room.zero_()
            room[:, :now, :count] = values

    def _keep_beam(self, depth: int, picked_NB: Tensor, count: int, width: int) -> None:
        """count: children of a node, of which there may be fewer than `BRANCH` in a tiny vocabulary."""
        sequences, now = picked_NB.shape
        first = (depth - 1) * sequences * width
        room = self._tools.results.beams[first : first + sequences * width].view(sequences, width)
        room.fill_(-1)
        room[:, :now] = torch.where(picked_NB < 0, -1, picked_NB // count * BRANCH + picked_NB % count)

    def _draft_logits(
        self, shape: StepShape, states_TD: Tensor, each_T: Tensor, index_N: Tensor, drafts_TJ: Tensor | None
    ) -> Tensor:
        """Adjusted logits of the draft head. drafts_TJ: those before each row, after the latest known token."""
        tools = self._tools
        assert tools.weights.draft_head is not None, "only the last stage drafts"
        logits_TV = tools.weights.draft_head(states_TD)
        if not shape.adjusted:
            return logits_TV
        counts = tools.counts(shape, index_N + 1, DRAFT).at(each_T)
        penalties = tools.penalties(shape, index_N + 1).at(each_T)
        if drafts_TJ is not None:
            counts = counts.plus(drafts_TJ, torch.ones_like(drafts_TJ, dtype=torch.bool), tools.vocabularies[DRAFT])
            penalties = adjusting.later(penalties, drafts_TJ.shape[1])
        return adjusting.adjust(logits_TV, penalties, counts, tools.amended[DRAFT])

    def _confidence(self, states_ND: Tensor, logits_NV: Tensor) -> Tensor:
        """Confidences of drafts of chains: see `Drafter._choose`."""
        assert self._tools.weights.module is not None
        layer_N = self._tools.weights.module.confidence(states_ND)
        if layer_N is not None:
            return layer_N
        return (logits_NV.amax(-1) - logits_NV.logsumexp(-1)).exp().nan_to_num()
