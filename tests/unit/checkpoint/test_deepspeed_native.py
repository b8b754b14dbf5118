"""DeepSpeed's folders: what is refused, in one line and before anything is written, and the arithmetic of its partitions."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.convert import Conversion, convert
from recycle_ds.checkpoint.deepspeed_native import loading
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.config import RunConfig, save_config
from recycle_ds.model import build_model
from tests.runs import tiny_run
from tests.unit.checkpoint.families import SHAPE, make
from tests.unit.checkpoint.native_folder import STATE, change, write_folder

MODEL, FIRST, LAST = (
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "zero_pp_rank_2_mp_rank_00_optim_states.pt",
)


def small_run(folder: Path) -> RunConfig:
    """A configuration whose files do not exist: only the shapes matter."""
    sizes = {
        "model__layers": 1,
        "model__hidden": 16,
        "model__ffn": 22,
        "model__vocab_size": 30,
        "model__vocab_multiple": 7,
    }
    return tiny_run(folder / "corpus", folder, **sizes)


def weights_of(config: RunConfig) -> dict[str, Tensor]:
    model = build_model(config.model, config.recycle, seed=3)
    return {name: torch.rand_like(value) for name, value in model.named_parameters()}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """run/native of three ranks under ZeRO 2, run/config.yaml beside it, and the parameters."""
    config = small_run(tmp_path / "run")
    weights = weights_of(config)
    write_folder(tmp_path / "run" / "native", weights, align=4)
    save_config(config, tmp_path / "run" / "config.yaml")
    return tmp_path / "run" / "native", weights


def refusal(folder: Path, **options: Any) -> str:
    """The error of converting a folder, which leaves nothing behind."""
    target = folder.parent / "out"
    with pytest.raises(CheckpointError) as caught:
        convert(str(folder), str(target), Conversion("portable", **options))
    assert "\n" not in str(caught.value) and not target.exists()
    assert not list(folder.parent.glob(".tmp-*"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("stage", "ranks", "align"), [(1, 1, 1), (2, 3, 4), (2, 7, 8), (3, 1, 1), (3, 3, 1), (3, 11, 1)]
)
def test_every_element_is_found(tmp_path: Path, stage: int, ranks: int, align: int) -> None:
    """Padding between parameters, ranks of padding only, sub-groups: one element off and all that follow are."""
    config = small_run(tmp_path)
    weights = weights_of(config)
    write_folder(tmp_path / "native", weights, stage=stage, ranks=ranks, align=align)
    save_config(config, tmp_path / "config.yaml")
    source = open_source(tmp_path / "native")
    assert (source.kind, source.step, source.notes, source.tokenizer) == ("deepspeed", 5, (), None)
    assert torch.equal(source.read("embedding.weight"), weights["embedding.weight"][:30])
    query_key_value = weights["blocks.0.attention.query_key_value.weight"]
    assert torch.equal(source.read("blocks.0.attention.key.weight"), query_key_value[16:24])
    assert torch.equal(source.read("blocks.0.attention.key.weight", "exp_avg", 0, 2, 3), query_key_value[18:21] * 2)
    assert torch.equal(source.read("recycle.final_norm.weight", "exp_avg_sq"), weights["recycle.final_norm.weight"] * 3)
    assert torch.equal(
        source.read("recycle.projection.weight", axis=1, start=3), weights["recycle.projection.weight"][:, 3:]
    )
    result = convert(str(tmp_path / "native"), str(tmp_path / "out"), Conversion("portable"))
    assert all(torch.equal(result.read(name), source.read(name)) for name in source.shapes)


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


def test_without_optimizer_files_the_rounded_weights_are_told(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """bf16 weights passed off as masters, or refused although they are all that is asked for."""
    folder, weights = saved
    for file in (folder / "global_step5").glob("*optim_states.pt"):
        file.unlink()
    source = open_source(folder)
    assert torch.equal(source.read("final_norm.weight"), weights["final_norm.weight"].bfloat16())
    assert (
        len(source.notes) == 1 and "in bfloat16" in source.notes[0] and not source.has("final_norm.weight", "exp_avg")
    )


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


def test_without_a_configuration(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """A guess at heads or rotary base, which no tensor tells; an option that is passed over without a word."""
    folder, weights = saved
    config = folder.parent / "config.yaml"
    config.rename(tmp_path / "elsewhere.yaml")
    assert "--config FILE" in refusal(folder) and "config.yaml" in refusal(folder)
    result = convert(
        str(folder), str(tmp_path / "out"), Conversion("portable", config=str(tmp_path / "elsewhere.yaml"))
    )
    assert torch.equal(result.read("final_norm.weight"), weights["final_norm.weight"])
    assert "no such file" in refusal(folder, config="nowhere.yaml")
    with pytest.raises(CheckpointError, match="leave it out"):
        open_source(tmp_path / "out", config=tmp_path / "elsewhere.yaml")
    (folder / "config.yaml").write_text("model: {layers: 1}\n")
    assert "config.yaml: " in refusal(folder) and "required" in refusal(folder)


def test_another_configuration(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """Half a model: parameters that the configuration lacks, or that lie in another shape."""
    folder, _ = saved
    config = small_run(folder.parent)
    save_config(
        config.model_copy(update={"model": config.model.model_copy(update={"layers": 2, "ffn": 24})}),
        folder / "config.yaml",
    )
    message = refusal(folder)
    assert "missing: blocks.1." in message and "blocks.0.mlp.down.weight [16, 22] instead of [16, 24]" in message
    save_config(
        config.model_copy(update={"recycle": config.recycle.model_copy(update={"layers": 0})}), folder / "config.yaml"
    )
    assert "not in this model: recycle." in refusal(folder)


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


def test_which_tag(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """The wrong one of several checkpoints, or one outside the folder that was named."""
    folder, weights = saved
    assert open_source(folder / "global_step5").step == 5
    (folder / "latest").unlink()
    assert open_source(folder).step == 5
    write_folder(folder, {name: value + 1 for name, value in weights.items()}, step=9)
    assert open_source(folder).step == 9
    (folder / "latest").unlink()
    assert "2 checkpoints" in refusal(folder) and "global_step5, global_step9" in refusal(folder)
    shutil.copytree(folder / "global_step5", tmp_path / "outside")
    for text in ("../../outside", str(tmp_path / "outside"), "global_step7", ""):
        (folder / "latest").write_text(text)
        assert "which is not there" in refusal(folder)


def test_hugging_face_names(tmp_path: Path) -> None:
    """A wrapper's prefix in every name; transformers' own weights beside DeepSpeed's folder passed over; another layout."""
    model = make("qwen2_tied")
    checkpoint = tmp_path / "checkpoint-5"
    weights = {f"module.{name}": value.detach() for name, value in model.named_parameters()}
    tag = write_folder(checkpoint, weights)
    assert "config.json" in refusal(checkpoint)
    model.config.save_pretrained(checkpoint)
    source = open_source(checkpoint)
    assert (source.kind, source.seq_length, source.recycle.layers) == ("deepspeed", SHAPE["max_position_embeddings"], 0)
    assert torch.equal(
        source.read("blocks.2.attention.query.bias"), weights["module.model.layers.2.self_attn.q_proj.bias"]
    )
    model.save_pretrained(checkpoint)
    assert open_source(checkpoint).kind == "huggingface"
    assert open_source(tag).kind == "deepspeed"
    change(tag / MODEL, ("mp_world_size",), 2)
    change(tag / MODEL, ("checkpoint_parallel_dimensions", "tp_degree"), 2)
    shutil.copy(tag / MODEL, tag / "mp_rank_01_model_states.pt")
    for file in [*tag.glob("*optim_states.pt")]:
        shutil.copy(file, tag / file.name.replace("mp_rank_00", "mp_rank_01"))
    assert "tensor ranks (2) x stages (1) of a Hugging Face model" in refusal(tag)


def test_other_names(tmp_path: Path) -> None:
    """Some other model's weights, called missing one by one."""
    write_folder(tmp_path / "native", {"encoder.layer.weight": torch.rand(3, 3), "encoder.layer.bias": torch.rand(3)})
    assert "named neither" in refusal(tmp_path / "native")


def test_files_are_unmapped_on_the_way(saved: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is resident as a whole in the end, page by page."""
    folder, weights = saved
    monkeypatch.setattr(loading, "_MAPPED_BYTES", 1000)
    monkeypatch.setattr(loading, "_MAPPED_BYTES_PER_FILE", 0)
    source: Any = open_source(folder)
    for name in source.shapes:
        value = source.read(name)
        if value.nbytes > 1000:
            assert not source._files._open, name
    assert torch.equal(source.read("final_norm.weight"), weights["final_norm.weight"])


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


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    ranks=st.integers(1, 5),
    align=st.integers(1, 4),
)
def test_cutting_inverts_partitioning(sizes: list[int], ranks: int, align: int) -> None:
    """A boundary between ranks or sub-groups that falls inside, at the end of or beyond a parameter."""
    from recycle_ds.checkpoint.deepspeed_native.partitions import Flat, cut_each, cut_groups

    shapes = {f"p{number}": (size,) for number, size in enumerate(sizes)}
    ends = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    values = {name: list(range(ends[number], ends[number + 1])) for number, name in enumerate(shapes)}
    stored: dict[str, list[int]] = {}

    def flat(rank: int, index: int, content: list[int]) -> Flat:
        stored[f"{rank}/{index}"] = content
        return Flat(f"{rank}/{index}", (index,), len(content))

    line: list[int] = []
    paddings = []
    for number, value in enumerate(values.values()):
        line += value
        paddings.append(-len(line) % align if number + 1 < len(sizes) else 0)
        line += [-1] * paddings[-1]
    size = -(-len(line) // (2 * ranks)) * 2
    row = [flat(rank, 0, line[rank * size : (rank + 1) * size]) for rank in range(ranks)]
    found = cut_groups([shapes], [paddings], [row], "x")
    assert {
        name: [n for s in spans for n in stored[s.file][s.start : s.start + s.length]] for name, spans in found.items()
    } == values

    columns = []
    for rank in range(ranks):
        parts = [(value + [-1] * (-len(value) % ranks)) for value in values.values()]
        own = [part[rank * len(part) // ranks : (rank + 1) * len(part) // ranks] for part in parts]
        columns.append(
            [
                flat(rank, index, [n for part in own[2 * index : 2 * index + 2] for n in part])
                for index in range(-(-len(own) // 2))
            ]
        )
    found = cut_each(shapes, columns, "x")
    assert {
        name: [n for s in spans for n in stored[s.file][s.start : s.start + s.length]] for name, spans in found.items()
    } == values
