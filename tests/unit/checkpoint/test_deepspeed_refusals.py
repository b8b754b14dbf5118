"""DeepSpeed's folders that are damaged, contradictory or would run code: refused in one line, without output."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.deepspeed_native import loading
from recycle_ds.checkpoint.recognition import open_source
from tests.unit.checkpoint.native_folder import (
    FIRST,
    LAST,
    MODEL,
    STATE,
    change,
    refusal,
    write_folder,
)


class Foreign:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("file", [MODEL, FIRST, LAST])
def test_foreign_code_is_refused_and_not_run(saved: tuple[Path, dict[str, Tensor]], file: str) -> None:
    """Prevents a downloaded checkpoint from running code during its conversion."""
    folder, _ = saved
    change(folder / "global_step5" / file, ("note",), Foreign(folder / "made"))
    message = refusal(folder)
    assert file in message and "posix.mkdir" in message and "was not loaded" in message
    assert not (folder / "made").exists()


def test_other_classes_of_a_known_package_are_refused(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """Prevents an allow-list that accepts every class of the package."""
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

    folder, _ = saved
    change(folder / "global_step5" / MODEL, ("device",), OffloadDeviceEnum.cpu)
    assert "deepspeed.runtime.zero.offload_config.OffloadDeviceEnum" in refusal(folder)


def test_known_classes_are_not_instantiated() -> None:
    """Prevents DeepSpeed's code from running on a file's content: placeholders replace its objects."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    assert not issubclass(loading.Inert, LossScaler) and vars(loading.Inert(1, 2)) == {}


@pytest.mark.parametrize("file", [MODEL, "zero_pp_rank_1_mp_rank_00_optim_states.pt", LAST])
def test_missing_files_are_named(saved: tuple[Path, dict[str, Tensor]], file: str) -> None:
    """Prevents a copy without a rank's file from being converted as if the world size had been smaller."""
    folder, _ = saved
    (folder / "global_step5" / file).unlink()
    message = refusal(folder)
    # that the last data rank existed is recorded only in the other files
    assert ("was saved by 3 data ranks" if file == LAST else file) in message, message


def test_missing_files_of_zero3_are_named(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """Prevents a missing file from being ignored with partitioned weights, where every rank has two files."""
    folder, weights = saved
    shutil.rmtree(folder)
    tag = write_folder(folder, weights, stage=3)
    (tag / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    assert "missing for 1 model-parallel x 3 data ranks: zero_pp_rank_1_mp_rank_00_model_states.pt" in refusal(folder)
    for file in tag.glob("*optim_states.pt"):
        file.unlink()
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt" in refusal(folder)


@pytest.mark.parametrize("cut", [0, 3, 400, -30])
def test_truncated_files_are_named(saved: tuple[Path, dict[str, Tensor]], cut: int) -> None:
    """Prevents a stack trace, or zeros as weights, from an incomplete copy."""
    folder, _ = saved
    path = folder / "global_step5" / FIRST
    path.write_bytes(path.read_bytes()[:cut])
    assert FIRST in refusal(folder)


def test_a_flipped_bit_is_detected(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """Prevents a memory-mapped weight corrupted by the disk from being used: torch.load does not detect it."""
    folder, weights = saved
    path = folder / "global_step5" / FIRST
    content = bytearray(path.read_bytes())
    needle = weights["embedding.weight"].flatten()[:16].numpy().tobytes()
    content[content.index(needle) + 5] ^= 4
    path.write_bytes(content)
    message = refusal(folder)
    assert f"damaged: {FIRST}" in message and "checksum" in message
    open_source(folder, verify=False)


# file, keys, new value (... deletes it), part of the error
CHANGES: list[tuple[str, tuple[Any, ...], Any, str]] = [
    (MODEL, ("dp_world_size",), 4, "saved by 4 data ranks, but the file names show 3"),
    (MODEL, ("mp_world_size",), 2, "saved by 2 model-parallel ranks, but the file names show 1"),
    (MODEL, ("checkpoint_parallel_dimensions", "pp_degree"), 2, "saved by 2 pipeline stages"),
    (MODEL, ("global_steps",), ..., "global_steps is missing"),
    (MODEL, ("module",), None, "module is missing"),
    (MODEL, ("param_shapes",), {}, "param_shapes is a dict, not a list"),
    (MODEL, ("param_shapes", 0, "embedding.weight"), "x", "the shape of embedding.weight is 'x'"),
    (MODEL, ("param_shapes", 0, "embedding.weight"), [35, 17], "group 0: 3 data ranks hold"),
    (MODEL, ("param_shapes", 1), ..., "1 parameter groups, but [2, 2, 2] weight groups by data rank"),
    (FIRST, (STATE, "partition_count"), [3, 2], "saved by 2 data ranks"),
    (FIRST, (STATE, "param_alignment_paddings", 0), [0], "parameters, but 1 paddings"),
    (FIRST, (STATE, "param_alignment_paddings", 0), "x", "param_alignment_paddings"),
    (FIRST, (STATE, "single_partition_of_fp32_groups"), ..., "single_partition_of_fp32_groups is missing"),
    (FIRST, (STATE, "single_partition_of_fp32_groups", 0), torch.zeros(0), "group 0: 3 data ranks hold"),
    (LAST, (STATE, "single_partition_of_fp32_groups", 0), torch.zeros(4, 4), "shape [4, 4]"),
    (LAST, (STATE, "single_partition_of_fp32_groups", 1), None, "1 is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "keys", "value", "words"), CHANGES)
def test_contradictions_are_refused(
    saved: tuple[Path, dict[str, Tensor]], file: str, keys: tuple[Any, ...], value: Any, words: str
) -> None:
    """Prevents a model assembled from files of different saves or of another release."""
    folder, _ = saved
    change(folder / "global_step5" / file, keys, value)
    message = refusal(folder)
    assert words in message and str(folder / "global_step5") in message, message


def test_files_of_two_saves(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """Prevents mixing the files of a tag that was saved twice, with another number of ranks or another ZeRO stage."""
    folder, weights = saved
    tag = folder / "global_step5"
    shutil.copy(tag / FIRST, tag / f"bf16_{FIRST}")
    assert "files of two saves" in refusal(folder)
    (tag / f"bf16_{FIRST}").unlink()
    shutil.copy(tag / LAST, tag / LAST.replace("rank_2", "rank_3"))
    assert "3 data ranks, but the file names show 4" in refusal(folder)
    (tag / LAST.replace("rank_2", "rank_3")).unlink()
    shutil.copy(tag / MODEL, tag / f"zero_pp_rank_0_{MODEL}")
    assert "of ZeRO 3" in refusal(folder)
    (tag / f"zero_pp_rank_0_{MODEL}").unlink()
    shutil.rmtree(folder)
    tag = write_folder(folder, weights, stage=3)
    change(tag / "zero_pp_rank_1_mp_rank_00_model_states.pt", ("global_steps",), 4)
    assert "files of several saves" in refusal(folder) and "of step 4" in refusal(folder)


def test_layers_and_experts(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """Prevents a pipeline with a missing stage, or silently ignored experts."""
    folder, _ = saved
    tag = folder / "global_step5"
    for name in ("layer_00-model_00", "layer_02-model_00"):
        shutil.copy(tag / MODEL, tag / f"{name}-model_states.pt")
    assert "missing for 3 stages x 1 tensor ranks: layer_01-model_00-model_states.pt" in refusal(folder)
    shutil.copy(tag / MODEL, tag / "layer_01-model_00-model_states.pt")
    assert "layers (3) x tensor ranks (1) != mp_rank files (1)" in refusal(folder)
    shutil.copy(tag / MODEL, tag / "layer_0_expert_0_mp_rank_00_model_states.pt")
    assert "experts" in refusal(folder)


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the key paths of all values in a file."""
    found = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += nodes(value, (*path, key))
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_random_values_in_a_file(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path, stage: int) -> None:
    """Prevents a stack trace, or weights other than those saved, from a file with a replaced value."""
    folder, weights = saved
    shutil.rmtree(folder)
    tag = write_folder(folder, weights, stage=stage, ranks=2)
    intact = open_source(folder)
    expected = {name: intact.read(name) for name in intact.shapes}
    draw = random.Random(stage)
    junk: list[Any] = [
        ...,
        None,
        -1,
        10**9,
        "x",
        [],
        {},
        torch.zeros(2),
        torch.zeros(3, dtype=torch.int64),
        [None],
        {1: 2},
    ]
    refused = 0
    for _ in range(60):
        file = draw.choice(sorted(tag.glob("*.pt")))
        shutil.copy(file, tmp_path / "intact.pt")
        keys = draw.choice(nodes(torch.load(file, weights_only=False)))
        value = draw.choice(junk)
        change(file, keys, value)
        try:
            source = open_source(folder)
            found = {name: source.read(name) for name in source.shapes}
            assert all(torch.equal(found[name], expected[name]) for name in expected), (file.name, keys, value)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and str(folder) in str(error)
        shutil.copy(tmp_path / "intact.pt", file)
    assert 10 < refused < 60
