"""The data of a run: token files and tokenizer, opened and checked, and what a checkpoint records of them."""

from __future__ import annotations

from dataclasses import dataclass

from recycle_ds.checkpoint.portable.manifest import DataIdentity
from recycle_ds.config import TokenSource
from recycle_ds.data.errors import DataError
from recycle_ds.data.loader import BatchLoader, open_dataset
from recycle_ds.data.token_files import read_sidecar
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.parallel.agree import broadcast_from, on_all_ranks
from recycle_ds.training.run_context import RunContext


@dataclass(frozen=True)
class Inputs:
    """The data of a run."""

    identity: DataIdentity
    train: BatchLoader
    validation: BatchLoader | None


def open_inputs(context: RunContext) -> Inputs:
    """Opens tokenizer and token files and checks that they belong together, and are the same for all ranks. Collective.

    Raises the same SharedError, or MachineFault, on all ranks."""
    inputs = on_all_ranks(lambda: _open(context), context.mesh)
    own = (context.config.model.vocab_size, inputs.identity)
    first = broadcast_from(0, own, context.mesh)

    def compare() -> None:
        if own != first:
            raise DataError(
                f"data.tokenizer ({context.config.data.tokenizer}) or the token files of data.train are other files here than "
                "on rank 0: copy them from its host"
            )

    on_all_ranks(compare, context.mesh)
    return inputs


def _open(context: RunContext) -> Inputs:
    data, training, recycle = context.config.data, context.config.training, context.config.recycle
    tokenizer = Tokenizer.load(data.tokenizer)

    def loader(sources: tuple[TokenSource, ...]) -> BatchLoader:
        return BatchLoader(
            open_dataset(sources, tokenizer, training.seq_length, training.seed),
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            depth=recycle.depth if recycle.layers else 0,
            data_rank=context.mesh.data.rank,
            data_size=context.mesh.data.size,
        )

    train = loader(data.train)
    validation = loader(data.validation) if data.validation and training.eval_every else None
    sidecars = [read_sidecar(source.path) for source in data.train]
    files: list[dict[str, int | str]] = [
        {"tokens": one.tokens, "documents": one.documents, "sha256": one.bin_sha256} for one in sidecars
    ]
    return Inputs(DataIdentity(tokenizer=tokenizer.fingerprint, train=files), train, validation)
