"""Micro-batches of one data-parallel rank, as tensors.

Shapes: B sequences of a micro-batch, S positions, K recycle depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from recycle_ds.config.schema import TokenSource
from recycle_ds.data.errors import DataError
from recycle_ds.data.sampling import PackedDataset
from recycle_ds.data.targets import make_targets
from recycle_ds.data.token_files import open_token_file
from recycle_ds.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Batch:
    """One micro-batch. All tensors are int64."""

    tokens_BS: Tensor
    """[B, S] input tokens of the backbone."""
    positions_BS: Tensor
    """[B, S] rotary positions, from 0 at the start of each sample and of each document."""
    documents_BS: Tensor
    """[B, S] number of the document within its sample, from 0; attention is restricted to equal numbers."""
    inputs_KBS: Tensor
    """[K+1, B, S] token read at each depth; depth 0 is `tokens_BS`."""
    targets_KBS: Tensor
    """[K+1, B, S] token predicted at each depth, `targets.IGNORE` where no loss is computed."""
    single: bool | None = None
    """Whether each sequence is one document, as known on the host; None if unknown."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; the host does not wait for the copy of a pinned one."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies while the host goes on. Needs CUDA."""
        return self._with(lambda tensor: tensor.pin_memory())

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            tokens_BS=change(self.tokens_BS),
            positions_BS=change(self.positions_BS),
            documents_BS=change(self.documents_BS),
            inputs_KBS=change(self.inputs_KBS),
            targets_KBS=change(self.targets_KBS),
        )

    def part(self, rank: int, size: int) -> Batch:
        """Part `rank` of `size` of every sequence. `documents_BS` keeps its full length, because attention needs all of it."""
        if size == 1:
            return self
        length = self.tokens_BS.shape[1] // size
        part = slice(rank * length, (rank + 1) * length)
        return Batch(
            tokens_BS=self.tokens_BS[:, part],
            positions_BS=self.positions_BS[:, part],
            documents_BS=self.documents_BS,
            inputs_KBS=self.inputs_KBS[:, :, part],
            targets_KBS=self.targets_KBS[:, :, part],
            single=self.single,
        )


class BatchLoader:
    """Cuts global batches of consecutive samples into the micro-batches of one data-parallel rank.

    Micro-batch m of rank r starts at sample first + (m * data_size + r) * micro_batch_size, so the samples of a global
    batch are the same in every parallel layout. The loader is stateless: the caller passes the position in the data as
    `first_sample`.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        depth: int,
        data_rank: int,
        data_size: int,
    ) -> None:
        """Args:
            dataset: source of the samples.
            global_batch_size: sequences in one optimizer step, over all ranks.
            micro_batch_size: sequences in one forward pass of one rank.
            depth: K.
            data_rank: this rank's index among the data-parallel ranks, from 0.
            data_size: number of data-parallel ranks.

        Raises:
            DataError: the global batch cannot be divided into equal micro-batches over the ranks.
        """
        parallel_size = micro_batch_size * data_size
        if global_batch_size <= 0 or global_batch_size % parallel_size:
            raise DataError(
                f"training.global_batch_size ({global_batch_size}) must be a multiple of training.micro_batch_size "
                f"({micro_batch_size}) x data-parallel ranks ({data_size}) = {parallel_size}"
            )
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data_rank ({data_rank}) must be in [0, data_size ({data_size}))")
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.micro_batches = global_batch_size // parallel_size
        """Micro-batches per rank and optimizer step."""
        self._depth, self._data_rank, self._data_size = depth, data_rank, data_size

    def step(self, first_sample: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that starts at global sample number `first_sample`."""
        starts = (
            first_sample + (m * self._data_size + self._data_rank) * self.micro_batch_size
            for m in range(self.micro_batches)
        )
        return [self._batch(range(start, start + self.micro_batch_size)) for start in starts]

    def _batch(self, numbers: Sequence[int]) -> Batch:
        samples = [self.dataset.sample(number) for number in numbers]
        tokens_BT = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
        documents_BT = torch.from_numpy(np.stack([sample.documents for sample in samples]))
        positions_BT = torch.from_numpy(np.stack([sample.positions for sample in samples]))
        targets = make_targets(tokens_BT, documents_BT, self._depth)
        return Batch(
            tokens_BS=targets.inputs[0],
            positions_BS=positions_BT[:, :-1].contiguous(),
            documents_BS=documents_BT[:, :-1].contiguous(),
            inputs_KBS=targets.inputs,
            targets_KBS=targets.targets,
            single=not documents_BT[:, :-1].any(),
        )


def open_dataset(sources: Sequence[TokenSource], tokenizer: Tokenizer, seq_length: int, seed: int) -> PackedDataset:
    """Open the token files of a configuration, check them against the tokenizer, and blend them.

    Args:
        sources: paths and weights, as in `data.train`.
        tokenizer: the tokenizer that all files must have been made with.
        seq_length: S, tokens in a sequence.
        seed: determines the order of the samples.

    Raises:
        DataError: a file is unusable, made with another tokenizer, or too short for one sample.
    """
    return PackedDataset(
        [(open_token_file(source.path, tokenizer), source.weight) for source in sources], seq_length, seed
    )
