"""Megatron's format without Megatron: equal bits after a round trip at any layout, and errors that list mismatches."""

from __future__ import annotations

import pickle
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.conversion.inspection import describe
from recycle_ds.checkpoint.megatron.reading import MegatronSource
from recycle_ds.checkpoint.megatron.writing import write_megatron
from recycle_ds.checkpoint.portable.writing import write_portable
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.config import RopeConfig, RopeScaling
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.model import build_model
from tests.unit.checkpoint.megatron_cases import (
    CASES,
    CHECKPOINT,
    MODEL,
    MODULE,
    edit,
    first_info,
    refusal,
    rename,
    source_of,
    use_arguments,
    write,
)
from tests.unit.checkpoint.memory import ModelSource


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", [(1, 1), (2, 2)])
def test_round_trip(name: str, layout: tuple[int, int], tmp_path: Path) -> None:
    """Prevents weights or module settings from being changed, swapped or lost in a round trip."""
    source = source_of(name, tmp_path)
    (tmp_path / "portable").mkdir()
    write_portable(source, tmp_path / "portable", None, 2**30, lambda _: None)
    written = convert(
        str(tmp_path / "portable"),
        str(tmp_path / "megatron"),
        Conversion("megatron", tensor=layout[0], pipeline=layout[1]),
    )
    assert (written.kind, written.step, written.model, written.recycle) == ("megatron", 7, source.model, source.recycle)
    files = sorted(path.name for path in (tmp_path / "megatron" / CHECKPOINT).glob("*.distcp"))
    assert files == sorted(f"__{rank}_0.distcp" for rank in range(layout[0] * layout[1]))
    back = convert(str(tmp_path / "megatron"), str(tmp_path / "back"), Conversion("portable"))
    assert (back.model, back.recycle, back.step) == (source.model, source.recycle, 7)
    assert back.shapes == source.shapes
    for key in source.shapes:
        assert torch.equal(back.read(key), source.read(key)), key


def test_any_part_of_a_tensor(tmp_path: Path) -> None:
    """Prevents a rank from reading rows of a neighbouring head or chunk when the checkpoint has another layout."""
    draw = random.Random(3)
    for name in ("untied_bias", "deep_linear_rope"):
        source = write(tmp_path / name, name)
        opened = open_source(tmp_path / name)
        for key, shape in source.shapes.items():
            for axis, size in enumerate(shape):
                for _ in range(3):
                    start = draw.randrange(size)
                    length = draw.randint(1, size - start)
                    part = opened.read(key, axis=axis, start=start, length=length)
                    assert part.is_contiguous()
                    assert torch.equal(part, source.read(key, axis=axis, start=start, length=length)), (key, axis)


def test_dtypes_and_tokenizer_are_kept(tmp_path: Path) -> None:
    """Prevents a dtype that changes without a request, and layers of several dtypes in a format that has only one."""
    source = source_of("grouped_tied", tmp_path)
    Tokenizer.train(["some words of text"] * 9, 260).save(tmp_path / "tokenizer")
    source.tokenizer = tmp_path / "tokenizer" / "tokenizer.json"
    (tmp_path / "out").mkdir()
    write_megatron(source, tmp_path / "out", torch.bfloat16, 1, 1, lambda _: None)
    result = open_source(tmp_path / "out")
    assert result.tokenizer == tmp_path / "out" / CHECKPOINT / "tokenizer.json"
    for key in source.shapes:
        assert result.dtype(key) == torch.bfloat16
        assert torch.equal(result.read(key), source.read(key).bfloat16()), key
    found = describe(tmp_path / "out")
    assert found["layout"] == {"tensor": 1, "pipeline": 1} and found["dtypes"] == {"bfloat16": len(source.shapes)}
    source._values["blocks.1.mlp.down.weight"] = source.read("blocks.1.mlp.down.weight").half()
    (tmp_path / "mixed").mkdir()
    with pytest.raises(CheckpointError, match=r"types differ .* blocks\.1\.mlp\.down\.weight .* give --dtype"):
        write_megatron(source, tmp_path / "mixed", None, 1, 1, lambda _: None)
    assert not list((tmp_path / "mixed").iterdir())


def test_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    """Prevents a complete 70 B model in memory while it is written: tensors must be read and released one by one."""
    source = source_of("grouped_tied", tmp_path)
    given: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    read = source.read

    def counted(*args: Any, **options: Any) -> Tensor:
        value = read(*args, **options).clone()
        given.append(weakref.ref(value))
        alive.append(sum(one() is not None for one in given))
        return value

    source.read = counted  # type: ignore[method-assign]
    (tmp_path / "out").mkdir()
    write_megatron(source, tmp_path / "out", None, 1, 1, lambda _: None)
    assert max(alive) <= 4  # queries, keys and values of a layer, and one left over from the previous tensor


@pytest.mark.parametrize(
    ("model", "recycle", "layout", "message"),
    [
        ({}, {"layers": 2}, (1, 1), "recycle.layers=2: an MTP layer of Megatron has one block"),
        ({"heads": 6, "kv_heads": 3, "head_dim": 8}, {}, (2, 1), r"model.kv_heads \(3\) must be divisible by --tp \(2\)"),
        ({"ffn": 46}, {"layers": 0}, (4, 1), r"model.kv_heads \(2\) .* \(4\); model.ffn \(46\) must be divisible by --tp"),
        ({}, {}, (1, 3), r"model.layers \(4\) must be divisible by --pp \(3\)"),
        (
            {"rope": RopeConfig(scaling=RopeScaling(kind="llama3", factor=8.0, original_positions=32))},
            {}, (1, 1), r"model.rope.scaling.original_positions=32: fixed to 8192",
        ),
    ],
)  # fmt: skip
def test_models_that_cannot_be_written(
    model: dict[str, Any], recycle: dict[str, Any], layout: tuple[int, int], message: str, tmp_path: Path
) -> None:
    """Prevents a checkpoint that loads only in part, or that computes something else than the model."""
    shape, module = MODEL.model_copy(update=model), MODULE.model_copy(update=recycle)
    source = ModelSource(build_model(shape, module), shape, module, tmp_path)
    (tmp_path / "portable").mkdir()
    write_portable(source, tmp_path / "portable", None, 2**30, lambda _: None)
    conversion = Conversion("megatron", tensor=layout[0], pipeline=layout[1])
    with pytest.raises(CheckpointError, match=message):
        convert(str(tmp_path / "portable"), str(tmp_path / "out"), conversion)
    assert [path.name for path in tmp_path.iterdir()] == ["portable"], "no output is left behind"


def test_notes_name_the_differences_in_megatron(tmp_path: Path) -> None:
    """Prevents a conversion that does not tell the user about unsaved depths or the options that Megatron needs."""
    write(tmp_path / "deep", "deep_linear_rope")
    (depth, options) = open_source(tmp_path / "deep").notes
    assert "recycle.depth=3: one MTP layer" in depth
    assert options.endswith("--rotary-seq-len-interpolation-factor 4")
    write(tmp_path / "llama", "bias_llama3_rope")
    assert open_source(tmp_path / "llama").notes[0].endswith("--use-rope-scaling --rope-scaling-factor 8")
    write(tmp_path / "plain")
    assert open_source(tmp_path / "plain").notes == ()


def test_iterations_are_found(tmp_path: Path) -> None:
    """Prevents the reader from reading another checkpoint than the one that the tracker file names."""
    write(tmp_path / "run")
    (tmp_path / "run" / CHECKPOINT).rename(tmp_path / "run" / "iter_0000040")
    tracker = tmp_path / "run" / "latest_checkpointed_iteration.txt"
    assert "release: no such folder" in refusal(tmp_path / "run")
    tracker.write_text("40")
    assert open_source(tmp_path / "run").folder == tmp_path / "run" / "iter_0000040"
    assert open_source(tmp_path / "run" / "iter_0000040").kind == "megatron"
    tracker.write_text("../../etc")
    assert "'../../etc' is neither an iteration nor 'release'" in refusal(tmp_path / "run")
    tracker.write_text("50")
    (tmp_path / "run" / "iter_0000050" / "mp_rank_00").mkdir(parents=True)
    assert "only the torch_dist format is supported" in refusal(tmp_path / "run")


def test_arguments_of_a_real_run(tmp_path: Path) -> None:
    """Prevents a checkpoint from being refused for a Megatron-LM class that does not matter for the model."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    write(tmp_path / "run")
    folder = use_arguments(
        tmp_path / "run" / CHECKPOINT, attention_backend=AttnBackend.auto, model_type=ModelType.encoder_or_decoder,
        save=Path("/somewhere"), params_dtype=torch.bfloat16,
    )  # fmt: skip
    source = open_source(folder)
    assert (source.model.vocab_size, source.step, source.recycle) == (107, 3, MODULE)
    assert isinstance(source, MegatronSource) and source.layout == {"tensor": 2, "pipeline": 1}
    use_arguments(folder, vocab_size=None)
    source = open_source(folder)
    assert source.model.vocab_size == 128 and "128 tokens including Megatron's padding" in source.notes[0]
    assert source.read("embedding.weight").shape == (128, 32)
    assert not source.read("embedding.weight", start=107).any()
    torch.save({"iteration": 3}, folder / "common.pt")
    assert "common.pt has no args" in refusal(folder) and "add a recycle_ds.json" in refusal(folder)
    (folder / "common.pt").unlink()
    assert "no common.pt" in refusal(folder)


def test_optimizer_states_are_ignored(tmp_path: Path) -> None:
    """Prevents a training checkpoint from being refused for its optimizer state."""
    source = write(tmp_path / "run")

    def add(listing: Any) -> None:
        for prefix in ("optimizer.state.exp_avg.", "chained_0.optimizer.distributed."):
            entry = listing.state_dict_metadata["decoder.final_layernorm.weight"]
            key = f"{prefix}decoder.final_layernorm.weight"
            listing.state_dict_metadata[key] = entry
            index = next(iter(listing.storage_data))
            where = type(index)(key, entry.chunks[0].offsets)
            listing.storage_data[where] = first_info(listing)

    edit(tmp_path / "run" / CHECKPOINT, add)
    opened = open_source(tmp_path / "run")
    assert torch.equal(opened.read("final_norm.weight"), source.read("final_norm.weight"))


def test_newer_names_of_the_block_in_an_mtp_layer(tmp_path: Path) -> None:
    """Prevents a checkpoint of a newer release from being refused for a renamed block."""
    source = write(tmp_path / "run")
    folder = tmp_path / "run" / CHECKPOINT
    for name in list(pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata):
        if ".transformer_layer." in name:
            edit(folder, rename(name, name.replace("transformer_layer", "mtp_model_layer")))
    opened = open_source(folder)
    for name in source.shapes:
        assert torch.equal(opened.read(name), source.read(name)), name
