"""Reading and writing Megatron checkpoints, compared with megatron-core's own model, loader and `save`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.portable.writing import write_portable
from recycle_ds.checkpoint.recognition import open_source
from tests.distributed import run_ranks
from tests.parallel.megatron_core import Case, Gap, compare, exchange, our_logits
from tests.unit.checkpoint.megatron_cases import CASES, arguments_of, source_of

CLOSE, FAR = 1e-4, 0.1
LAYOUTS = ({}, {"non_homogeneous_layers": True}, {"singleton_local_shards": True}, {}, {}, {}, {})


@dataclass(frozen=True)
class Exchange:
    """Checkpoints written by this package and by megatron-core, and the logits of megatron-core's models with them."""

    ours: dict[str, Path]
    of_ours: list[list[list[Tensor]]]
    """Logits with the weights of `ours`, by rank, case, and backbone or module."""
    theirs: Path
    of_theirs: list[list[Tensor]]
    cases: list[Case]


@pytest.fixture(scope="module", params=[1, 2])
def exchanged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exchange:
    """Our checkpoints have two tensor ranks and two stages; megatron-core's models have one or two tensor ranks."""
    root = tmp_path_factory.mktemp("exchange")
    ours: dict[str, Path] = {}
    for name in CASES:
        portable = root / name / "portable"
        portable.mkdir(parents=True)
        write_portable(source_of(name, root), portable, None, 2**30, lambda _: None)
        ours[name] = root / name / "megatron"
        convert(str(portable), str(ours[name]), Conversion("megatron", tensor=2, pipeline=2))
    cases: list[Case] = [
        (model, recycle.model_copy(update={"depth": 1}), layout, arguments_of(model, recycle, request.param))
        for (model, recycle), layout in zip(CASES.values(), LAYOUTS, strict=True)
    ]
    paths = [str(path) for path in ours.values()]
    results = run_ranks(exchange, request.param, paths, str(root / "theirs"), cases)
    return Exchange(ours, [loaded for loaded, _ in results], root / "theirs", results[0][1], cases)


def check(name: str, gap: Gap) -> None:
    assert gap.scale > 1, "logits near zero would agree for any weights"
    assert gap.backbone < CLOSE, name
    assert (gap.module is not None) == bool(CASES[name][1].layers), name
    assert gap.module is None or gap.module < CLOSE, name


def test_megatron_loads_our_checkpoints(exchanged: Exchange) -> None:
    """Prevents a checkpoint that Megatron loads without an error but that generates noise: query heads in the wrong
    group, gate and up or the halves of the projection swapped, a wrong RoPE base, or chunks at a wrong offset."""
    for number, (name, folder) in enumerate(exchanged.ours.items()):
        logits = our_logits(open_source(folder))
        for theirs in exchanged.of_ours:
            check(name, compare(logits, theirs[number]))


def test_we_load_megatrons_checkpoints(exchanged: Exchange, tmp_path: Path) -> None:
    """Prevents a reader that reads only our own files, not numbered layers, separate gate and up, or `args`."""
    for number, (name, (model, recycle, _, _)) in enumerate(zip(CASES, exchanged.cases, strict=True)):
        folder = exchanged.theirs / f"{number}"
        source = open_source(folder)
        assert (source.kind, source.step, source.seq_length) == ("megatron", 12, 32)
        assert source.model == model.model_copy(update={"head_dim": model.dim_per_head}) and source.recycle == recycle
        gap = compare(our_logits(source), exchanged.of_theirs[number])
        check(name, gap)
        result = convert(str(folder), str(tmp_path / name), Conversion("portable"))
        assert compare(our_logits(result), exchanged.of_theirs[number]) == gap


@pytest.mark.parametrize(
    "tensor", ["recycle.projection", "blocks.1.attention.query", "blocks.2.mlp.gate", "recycle.blocks.0.attention.key"]
)
def test_swapped_weights_are_detected(exchanged: Exchange, tensor: str, tmp_path: Path) -> None:
    """Prevents the comparisons above from passing for any weights."""
    source = source_of("grouped_tied", tmp_path)
    weight = source.read(f"{tensor}.weight")
    changed = weight.roll(32, dims=1) if tensor == "recycle.projection" else weight.flip(0)
    assert not torch.equal(changed, weight)
    source._values[f"{tensor}.weight"] = changed
    gap = compare(our_logits(source), exchanged.of_ours[0][0])
    assert gap.module is not None and gap.module > FAR
    assert (gap.backbone > FAR) == tensor.startswith("blocks")
