"""Checksums of Megatron and DeepSpeed checkpoints: verified before a weight is read, by all ranks, in small blocks."""

from __future__ import annotations

import io
import random
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.deepspeed_native.reading import DeepSpeedSource
from recycle_ds.checkpoint.files.torch_archives import FilePart, archive_fault
from recycle_ds.checkpoint.megatron.reading import MegatronSource
from recycle_ds.checkpoint.megatron.writing import write_megatron
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.config import save_config
from recycle_ds.model import build_model
from tests.runs import tiny_run
from tests.unit.checkpoint.megatron_cases import source_of
from tests.unit.checkpoint.memory import ModelSource
from tests.unit.checkpoint.native_folder import write_folder


@pytest.fixture
def megatron(tmp_path: Path) -> tuple[Path, ModelSource]:
    """release/ for two tensor ranks and two pipeline stages, and the source it was written from."""
    source = source_of("grouped_tied", tmp_path)
    (tmp_path / "run").mkdir()
    write_megatron(source, tmp_path / "run", None, 2, 2, lambda _: None)
    return tmp_path / "run" / "release", source


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """The folder of a DeepSpeed checkpoint of three data ranks."""
    config = tiny_run(tmp_path / "corpus", tmp_path / "run", model__vocab_size=30, model__layers=1)
    model = build_model(config.model, config.recycle, seed=3)
    tag = write_folder(tmp_path / "native", {name: value.detach() for name, value in model.named_parameters()})
    save_config(config, tmp_path / "config.yaml")
    return tag


def flip(path: Path, value: torch.Tensor) -> None:
    """Flips a bit in the first values of a tensor in a file."""
    content = bytearray(path.read_bytes())
    content[content.index(value.flatten()[:4].numpy().tobytes()) + 5] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_in_a_megatron_file_is_detected(megatron: tuple[Path, ModelSource]) -> None:
    """Prevents loading a weight that a bad disk changed: torch.load reads it without an error."""
    folder, source = megatron
    flip(folder / "__0_0.distcp", source.read("embedding.weight"))
    with pytest.raises(CheckpointError) as caught:
        open_source(folder)
    assert "damaged: __0_0.distcp (embedding.word_embeddings.weight: checksum mismatch in" in str(caught.value)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    # no other check detects this change
    opened = MegatronSource(folder, verify=False)
    assert not torch.equal(opened.read("embedding.weight"), source.read("embedding.weight"))


def test_a_flipped_bit_in_megatrons_arguments_is_detected(megatron: tuple[Path, ModelSource]) -> None:
    """Prevents reading a wrong rotary base from a damaged common.pt."""
    folder, _ = megatron
    (folder / "recycle_ds.json").unlink()
    path = folder / "common.pt"
    content = bytearray(path.read_bytes())
    position = content.index(b"rotary_base")
    number = content.index((10_000).to_bytes(2, "little"), position)
    content[number] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"common\.pt: damaged \(checksum mismatch in common/data\.pkl, unless "):
        open_source(folder)


@pytest.mark.parametrize("world_size", [1, 2, 3, 50])
def test_ranks_together_verify_every_megatron_file(megatron: tuple[Path, ModelSource], world_size: int) -> None:
    """Prevents a file that no rank verifies, and an error on ranks beyond the number of files."""
    folder, source = megatron
    opened = MegatronSource(folder, verify=False)
    for rank in range(world_size):
        opened.verify(rank, world_size)
    for file, name in (("__0_0.distcp", "embedding.weight"), ("__2_0.distcp", "final_norm.weight")):
        intact = (folder / file).read_bytes()
        flip(folder / file, source.read(name))
        refused = []
        for rank in range(world_size):
            try:
                opened.verify(rank, world_size)
            except CheckpointError as error:
                assert f"damaged: {file} (" in str(error)
                refused.append(rank)
        assert len(refused) == 1, file
        (folder / file).write_bytes(intact)


def test_ranks_together_verify_every_deepspeed_file(native: Path) -> None:
    """Prevents a file that no rank verifies, and verification by every rank although `verify` is False."""
    source = DeepSpeedSource(native)
    files = sorted(path.name for path in native.glob("*.pt"))
    last = native / files[-1]
    values = torch.load(last, weights_only=False)["optimizer_state_dict"]["single_partition_of_fp32_groups"][0]
    flip(last, values)
    refused = []
    for rank in range(3):
        try:
            source.verify(rank, 3)
        except CheckpointError as error:
            assert f"damaged: {last.name} (checksum mismatch in" in str(error) and "\n" not in str(error)
            refused.append(rank)
    assert refused == [(len(files) - 1) % 3]
    DeepSpeedSource(native, verify=False)
    with pytest.raises(CheckpointError, match="damaged"):
        DeepSpeedSource(native)


def test_a_missing_file_is_named(megatron: tuple[Path, ModelSource]) -> None:
    """Prevents a traceback if a file disappears between opening and verification."""
    folder, _ = megatron
    opened = MegatronSource(folder, verify=False)
    (folder / "__3_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"damaged: __3_0\.distcp \(No such file or directory\)"):
        opened.verify()


def test_memory_is_limited_to_a_block(tmp_path: Path) -> None:
    """Prevents reading tens of gigabytes into memory to verify them."""
    torch.save(torch.zeros(32 << 20, dtype=torch.uint8), tmp_path / "large.pt")
    tracemalloc.start()
    try:
        with (tmp_path / "large.pt").open("rb") as file:
            assert archive_fault(FilePart(file, 0, (tmp_path / "large.pt").stat().st_size)) is None
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_file_part_contains_only_its_bytes() -> None:
    """Prevents reading bytes of a neighbouring chunk, or seeking to them from the end."""
    part = FilePart(io.BytesIO(b"--chunk--"), 2, 5)
    assert part.read() == b"chunk" and part.read() == b"" and part.tell() == 5
    assert part.seek(-2, io.SEEK_END) == 3 and part.read(9) == b"nk"
    assert part.seek(1) == 1 and part.seek(2, io.SEEK_CUR) == 3 and part.read(1) == b"n"
    buffer = bytearray(9)
    part.seek(0)
    assert part.readinto(memoryview(buffer)) == 5 and buffer == b"chunk\0\0\0\0"
    assert part.seek(7) == 7 and part.read() == b""
    with pytest.raises(OSError, match="seek"):
        part.seek(-1)


def test_any_flipped_bit_of_an_archive(tmp_path: Path) -> None:
    """Prevents a traceback or wrong values after a bit flip in a name, a length or a checksum."""
    value = torch.arange(40, dtype=torch.float32)
    torch.save(value, tmp_path / "value.pt")
    intact = (tmp_path / "value.pt").read_bytes()
    draw = random.Random(1)
    detected = 0
    for _ in range(600):
        content = bytearray(intact)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        fault = archive_fault(io.BytesIO(bytes(content)))
        if fault is None:  # in the padding between members, or in a field that is not read
            try:
                assert torch.equal(torch.load(io.BytesIO(bytes(content)), weights_only=True), value)
            except RuntimeError as error:  # torch's reader checks a field that zipfile ignores
                assert "PytorchStreamReader" in str(error)
        else:
            assert fault and "\n" not in fault
            detected += 1
    assert detected > 200
    assert zipfile.is_zipfile(tmp_path / "value.pt") and archive_fault(tmp_path / "value.pt") is None
