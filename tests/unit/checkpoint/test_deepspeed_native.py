"""DeepSpeed's folders: naming schemes, notes, and the arithmetic of their partitions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.deepspeed_native import loading
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.config import save_config
from tests.unit.checkpoint.families import SHAPE, make
from tests.unit.checkpoint.native_folder import (
    MODEL,
    change,
    refusal,
    small_run,
    weights_of,
    write_folder,
)


@pytest.mark.parametrize(
    ("stage", "ranks", "align"), [(1, 1, 1), (2, 3, 4), (2, 7, 8), (3, 1, 1), (3, 3, 1), (3, 11, 1)]
)
def test_every_element_is_found(tmp_path: Path, stage: int, ranks: int, align: int) -> None:
    """Prevents offset errors from padding between parameters, ranks with padding only, and sub-groups."""
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


def test_without_optimizer_files_rounded_weights_are_reported(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """Prevents bf16 weights from being reported as master weights, or refused although no optimizer state is needed."""
    folder, weights = saved
    for file in (folder / "global_step5").glob("*optim_states.pt"):
        file.unlink()
    source = open_source(folder)
    assert torch.equal(source.read("final_norm.weight"), weights["final_norm.weight"].bfloat16())
    assert (
        len(source.notes) == 1 and "in bfloat16" in source.notes[0] and not source.has("final_norm.weight", "exp_avg")
    )


def test_without_a_configuration(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """Prevents guessing heads or RoPE base, which no tensor records, and an option that is silently ignored."""
    folder, weights = saved
    config = folder.parent / "config.yaml"
    config.rename(tmp_path / "elsewhere.yaml")
    assert "--config FILE" in refusal(folder) and "config.yaml" in refusal(folder)
    result = convert(
        str(folder), str(tmp_path / "out"), Conversion("portable", config=str(tmp_path / "elsewhere.yaml"))
    )
    assert torch.equal(result.read("final_norm.weight"), weights["final_norm.weight"])
    assert "no such file" in refusal(folder, config="nowhere.yaml")
    with pytest.raises(CheckpointError, match="omit it"):
        open_source(tmp_path / "out", config=tmp_path / "elsewhere.yaml")
    (folder / "config.yaml").write_text("model: {layers: 1}\n")
    assert "config.yaml: " in refusal(folder) and "required" in refusal(folder)


def test_another_configuration(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """Prevents a partly loaded model: parameters that are not in the configuration, or have another shape."""
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


def test_which_tag(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """Prevents reading the wrong one of several checkpoints, or one outside the given folder."""
    folder, weights = saved
    assert open_source(folder / "global_step5").step == 5
    (folder / "latest").unlink()
    assert open_source(folder).step == 5
    write_folder(folder, {name: value + 1 for name, value in weights.items()}, step=9)
    assert open_source(folder).step == 9
    (folder / "latest").unlink()
    assert "2 DeepSpeed checkpoints" in refusal(folder) and "global_step5, global_step9" in refusal(folder)
    shutil.copytree(folder / "global_step5", tmp_path / "outside")
    for text in ("../../outside", str(tmp_path / "outside"), "global_step7", ""):
        (folder / "latest").write_text(text)
        assert "which does not exist" in refusal(folder)


def test_hugging_face_names(tmp_path: Path) -> None:
    """Prevents refused names with a wrapper's prefix, a tag read as transformers' weights, and ignored tensor ranks."""
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


def test_a_tied_head_that_differs(tmp_path: Path) -> None:
    """Prevents a trained head from being dropped because the configuration says that it is the embedding."""
    model = make("llama_tied")
    weights = {name: value.detach() for name, value in model.named_parameters()}
    model.config.save_pretrained(tmp_path)
    write_folder(tmp_path, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    assert open_source(tmp_path).model.tied_embeddings
    shutil.rmtree(tmp_path / "global_step5")
    write_folder(tmp_path, weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1})
    assert "lm_head.weight differs from the embedding, but the configuration has tie_word_embeddings" in refusal(
        tmp_path
    )
    model.config.tie_word_embeddings = False
    model.config.save_pretrained(tmp_path)
    head = open_source(tmp_path).read("head.weight")
    assert torch.equal(head, weights["model.embed_tokens.weight"] + 1)


def test_other_names(tmp_path: Path) -> None:
    """Prevents weights of an unknown model from being reported as missing one by one."""
    write_folder(tmp_path / "native", {"encoder.layer.weight": torch.rand(3, 3), "encoder.layer.bias": torch.rand(3)})
    assert "match neither this package nor" in refusal(tmp_path / "native")


def test_files_are_unmapped_while_reading(
    saved: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents all pages of a model from becoming resident in memory."""
    folder, weights = saved
    monkeypatch.setattr(loading, "_MAPPED_BYTES", 1000)
    monkeypatch.setattr(loading, "_MAPPED_BYTES_PER_FILE", 0)
    source: Any = open_source(folder)
    for name in source.shapes:
        value = source.read(name)
        if value.nbytes > 1000:
            assert not source._files._open, name
    assert torch.equal(source.read("final_norm.weight"), weights["final_norm.weight"])


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    ranks=st.integers(1, 5),
    align=st.integers(1, 4),
)
def test_cutting_inverts_partitioning(sizes: list[int], ranks: int, align: int) -> None:
    """Prevents wrong elements at boundaries of ranks or sub-groups inside, at the end of or beyond a parameter."""
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
