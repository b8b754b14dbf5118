"""Reads checkpoints of Hugging Face models that DeepSpeed AutoTP split over tensor ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.huggingface.names import hugging_face_name
from recycle_ds.checkpoint.recognition import open_source
from tests.distributed import run_ranks
from tests.parallel.autotp_saves import train_autotp
from tests.parallel.native_saves import TheirRun
from tests.unit.checkpoint.native_folder import change

SPLIT: dict[str, Any] = {"tensor_parallel": {"autotp_size": 2}}
# name: family, DeepSpeed's configuration
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero0": ("mistral", {"zero_optimization": {"stage": 0}}),
    "zero1": ("llama", {"zero_optimization": {"stage": 1}}),
    "zero2_tied": ("llama_tied", {"zero_optimization": {"stage": 2}}),
    "zero1_head_norms": ("qwen3", {"zero_optimization": {"stage": 1}}),
    "zero1_bias": ("qwen2", {"zero_optimization": {"stage": 1}}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per run, as transformers' trainer saves them."""
    root = tmp_path_factory.mktemp("autotp")
    runs = [TheirRun(family, root / name / "checkpoint-3", SPLIT | config) for name, (family, config) in RUNS.items()]
    run_ranks(train_autotp, 2, runs, timeout=200.0)
    return root


@pytest.mark.parametrize("name", RUNS)
def test_the_same_bits(root: Path, name: str, tmp_path: Path) -> None:
    """Prevents columns read as rows, a vocabulary of which half is missing, and swapped parts of ranks."""
    folder = root / name / "checkpoint-3"
    gathered = torch.load(folder / "whole.pt", weights_only=True)
    source = open_source(folder)
    assert (source.kind, source.step, source.notes) == ("deepspeed", 3, ())
    assert source.layout == {"world_size": 2, "tensor": 2, "pipeline": 1, "data": 1}  # type: ignore[attr-defined]
    for tensor, shape in source.shapes.items():
        expected = gathered[hugging_face_name(tensor)]
        assert torch.equal(source.read(tensor), expected), tensor
        axis = len(shape) - 1
        part = source.read(tensor, axis=axis, start=shape[axis] // 3, length=shape[axis] // 2)
        assert torch.equal(part, expected.narrow(axis, shape[axis] // 3, shape[axis] // 2)), tensor
        if name != "zero0":
            assert source.read(tensor, "exp_avg").shape == torch.Size(shape), tensor
    result = convert(str(folder), str(tmp_path / "out"), Conversion("portable"))
    assert all(torch.equal(result.read(tensor), source.read(tensor)) for tensor in source.shapes)


def test_moments_are_laid_out_like_their_weights(root: Path) -> None:
    """Prevents moments of another rank's part: the rows of trained tokens must have a second moment above zero."""
    source = open_source(root / "zero2_tied" / "checkpoint-3")
    generator = torch.Generator().manual_seed(7)
    seen = torch.cat([torch.randint(300, (1, 12), generator=generator) for _ in range(3)]).flatten().unique()
    square = source.read("embedding.weight", "exp_avg_sq")
    assert square.shape == (300, 48) and (square[seen].sum(1) > 0).all()


def test_another_order_of_parts(root: Path, tmp_path: Path) -> None:
    """Prevents interleaved parts of a user's own plan from being read as consecutive parts of the same shapes."""
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(root / "zero1" / "checkpoint-3", folder)
    file = folder / "global_step3" / "mp_rank_01_model_states.pt"
    entry = "^model\\.layers\\.1\\.self_attn\\.q_proj\\.weight$"
    where = ("universal_checkpoint_info", "affine_map", "params", entry, "ranks", 1, "pieces")
    pieces = torch.load(file, weights_only=True)
    for key in where:
        pieces = pieces[key]
    for value in (pieces * 2, [pieces[0] | {"source": [48, [96, 1]]}], 7, [{}]):
        change(file, where, value)
        with pytest.raises(
            CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight is not split into consecutive parts"
        ) as caught:
            open_source(folder)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    change(file, ("universal_checkpoint_info",), ...)  # as an older release saves it
    assert open_source(folder).step == 3
    change(file, ("param_shapes", 0, "model.layers.1.self_attn.o_proj.weight"), torch.Size([24, 48]))
    with pytest.raises(
        CheckpointError, match=r"mp_rank_01 model\.layers\.1\.self_attn\.o_proj\.weight \[24, 48\] instead of"
    ):
        open_source(folder)
