"""DeepSpeed's folders that are damaged, contradict themselves or would run code: refused in one line, and nothing written."""

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
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("file", [MODEL, FIRST, LAST])
def test_foreign_code_is_refused_and_not_run(saved: tuple[Path, dict[str, Tensor]], file: str) -> None:
    """A checkpoint from elsewhere that runs code on whoever converts it."""
    folder, _ = saved
    change(folder / "global_step5" / file, ("note",), Foreign(folder / "made"))
    message = refusal(folder)
    assert file in message and "posix.mkdir" in message and "was not loaded" in message
    assert not (folder / "made").exists()


def test_the_class_alone_is_refused(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """An allow-list that lets through whatever lies in a package of that name."""
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

    folder, _ = saved
    change(folder / "global_step5" / MODEL, ("device",), OffloadDeviceEnum.cpu)
    assert "deepspeed.runtime.zero.offload_config.OffloadDeviceEnum" in refusal(folder)


def test_known_classes_are_not_made() -> None:
    """DeepSpeed's own code run on a file's content: stand-ins take its objects' places."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    assert not issubclass(loading.Inert, LossScaler) and vars(loading.Inert(1, 2)) == {}


@pytest.mark.parametrize("file", [MODEL, "zero_pp_rank_1_mp_rank_00_optim_states.pt", LAST])
def test_missing_files_are_named(saved: tuple[Path, dict[str, Tensor]], file: str) -> None:
    """A copy that lacks a rank's file, converted as if the world had been smaller."""
    folder, _ = saved
    (folder / "global_step5" / file).unlink()
    message = refusal(folder)
    # of the last data rank nothing but the other files' word is left
    assert ("was saved by 3 data ranks" if file == LAST else file) in message, message


def test_missing_files_of_zero3_are_named(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """The same where weights are partitioned: every rank has two files."""
    folder, weights = saved
    shutil.rmtree(folder)
    tag = write_folder(folder, weights, stage=3)
    (tag / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    assert "missing of 1 model-parallel x 3 data ranks: zero_pp_rank_1_mp_rank_00_model_states.pt" in refusal(folder)
    for file in tag.glob("*optim_states.pt"):
        file.unlink()
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt" in refusal(folder)


@pytest.mark.parametrize("cut", [0, 3, 400, -30])
def test_truncated_files_are_named(saved: tuple[Path, dict[str, Tensor]], cut: int) -> None:
    """A copy that ended early: a traceback, or weights of zeros."""
    folder, _ = saved
    path = folder / "global_step5" / FIRST
    path.write_bytes(path.read_bytes()[:cut])
    assert FIRST in refusal(folder)


def test_a_flipped_bit_is_seen(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """A memory-mapped weight that a bad disk changed, which torch.load does not notice."""
    folder, weights = saved
    path = folder / "global_step5" / FIRST
    content = bytearray(path.read_bytes())
    needle = weights["embedding.weight"].flatten()[:16].numpy().tobytes()
    content[content.index(needle) + 5] ^= 4
    path.write_bytes(content)
    message = refusal(folder)
    assert f"damaged: {FIRST}" in message and "checksum" in message
    open_source(folder, verify=False)


# file, keys, new value (... deletes it), a word of the error
CHANGES: list[tuple[str, tuple[Any, ...], Any, str]] = [
    (MODEL, ("dp_world_size",), 4, "saved by 4 data ranks, but by the names there are files of 3"),
    (MODEL, ("mp_world_size",), 2, "saved by 2 model-parallel ranks, but by the names there are files of 1"),
    (MODEL, ("checkpoint_parallel_dimensions", "pp_degree"), 2, "saved by 2 pipeline stages"),
    (MODEL, ("global_steps",), ..., "global_steps is missing"),
    (MODEL, ("module",), None, "module is missing"),
    (MODEL, ("param_shapes",), {}, "param_shapes is a dict, not a list"),
    (MODEL, ("param_shapes", 0, "embedding.weight"), "x", "the shape of embedding.weight is 'x'"),
    (MODEL, ("param_shapes", 0, "embedding.weight"), [35, 17], "group 0: 3 data ranks hold"),
    (MODEL, ("param_shapes", 1), ..., "1 groups of parameters, but by data rank [2, 2, 2] of weights"),
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
    """Files of several saves in one folder, and files of another release: a model put together of what does not belong."""
    folder, _ = saved
    change(folder / "global_step5" / file, keys, value)
    message = refusal(folder)
    assert words in message and str(folder / "global_step5") in message, message


def test_files_of_two_saves(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """A tag that was saved twice, by more ranks or another stage the first time."""
    folder, weights = saved
    tag = folder / "global_step5"
    shutil.copy(tag / FIRST, tag / f"bf16_{FIRST}")
    assert "files of two saves" in refusal(folder)
    (tag / f"bf16_{FIRST}").unlink()
    shutil.copy(tag / LAST, tag / LAST.replace("rank_2", "rank_3"))
    assert "3 data ranks, but by the names there are files of 4" in refusal(folder)
    (tag / LAST.replace("rank_2", "rank_3")).unlink()
    shutil.copy(tag / MODEL, tag / f"zero_pp_rank_0_{MODEL}")
    assert "of ZeRO 3" in refusal(folder)
    (tag / f"zero_pp_rank_0_{MODEL}").unlink()
    shutil.rmtree(folder)
    tag = write_folder(folder, weights, stage=3)
    change(tag / "zero_pp_rank_1_mp_rank_00_model_states.pt", ("global_steps",), 4)
    assert "files of several saves" in refusal(folder) and "of step 4" in refusal(folder)


def test_layers_and_experts(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """A pipeline of which a stage is missing, or experts left out without a word."""
    folder, _ = saved
    tag = folder / "global_step5"
    for name in ("layer_00-model_00", "layer_02-model_00"):
        shutil.copy(tag / MODEL, tag / f"{name}-model_states.pt")
    assert "missing of 3 stages x 1 tensor ranks: layer_01-model_00-model_states.pt" in refusal(folder)
    shutil.copy(tag / MODEL, tag / "layer_01-model_00-model_states.pt")
    assert "layers (3) x tensor ranks (1) != mp_rank files (1)" in refusal(folder)
    shutil.copy(tag / MODEL, tag / "layer_0_expert_0_mp_rank_00_model_states.pt")
    assert "experts" in refusal(folder)


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a file."""
    found = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += nodes(value, (*path, key))
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_whatever_lies_in_a_file(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path, stage: int) -> None:
    """A traceback, or other weights than those saved, from a file with some value replaced."""
    folder, weights = saved
    shutil.rmtree(folder)
    tag = write_folder(folder, weights, stage=stage, ranks=2)
    whole = open_source(folder)
    expected = {name: whole.read(name) for name in whole.shapes}
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
        shutil.copy(file, tmp_path / "whole.pt")
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
        shutil.copy(tmp_path / "whole.pt", file)
    assert 10 < refused < 60
