"""Reads folders that DeepSpeed wrote at every layout: bits equal those of a portable checkpoint of the same step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.recognition import open_source
from tests.distributed import run_in_sets, run_ranks
from tests.parallel.native_saves import TheirRun, run_and_save, train_theirs
from tests.parallel.parity import PIPELINE
from tests.runs import make_corpus, tiny_run, zero

Change = dict[str, Any]
BF16: Change = {"training__dtype": "bf16"}
STAGES: Change = {"parallel__pipeline": 2, "deepspeed": PIPELINE, "model__layers": 3}
# name: (ranks, changes)
CASES: dict[str, tuple[int, Change]] = {
    "frozen_bf16": (1, {"deepspeed": zero(2), "recycle__gradient": "frozen_backbone"} | BF16),
    "zero0_bf16": (1, {"deepspeed": zero(0)} | BF16),
    "zero0": (2, {"deepspeed": zero(0), "parallel__tensor": 2}),
    "zero1": (2, {"deepspeed": zero(1)}),
    "zero2": (2, {"deepspeed": zero(2), "model__tied_embeddings": False}),
    "zero3": (2, {"deepspeed": zero(3)}),
    "zero3_offload": (2, {"deepspeed": zero("3_offload")}),
    "zero1_bf16": (2, {"deepspeed": zero(1)} | BF16),
    "zero3_bf16": (2, {"deepspeed": zero(3)} | BF16),
    "tp2_zero1": (2, {"deepspeed": zero(1), "parallel__tensor": 2}),
    "tp2_sp_zero3": (2, {"deepspeed": zero(3), "parallel__tensor": 2, "parallel__sequence": True}),
    "tp2_head_norms": (
        2,
        {"deepspeed": zero(1), "parallel__tensor": 2, "model__qk_norm": True, "model__head_dim": 16},
    ),
    "ulysses2_zero2": (2, {"deepspeed": zero(2), "parallel__ulysses": 2}),
    "pp2": (2, STAGES),
    "pp2_bf16": (2, STAGES | BF16),
    "frozen_zero1": (2, {"deepspeed": zero(1), "recycle__gradient": "frozen_backbone"}),
    "frozen_zero3": (2, {"deepspeed": zero(3), "recycle__gradient": "frozen_backbone"}),
    "tp2_dp2_zero2": (4, {"deepspeed": zero(2), "parallel__tensor": 2}),
    "tp2_dp2_zero3": (4, {"deepspeed": zero(3), "parallel__tensor": 2}),
    "pp2_tp2": (4, STAGES | {"parallel__tensor": 2, "model__tied_embeddings": False}),
    "pp2_dp2": (4, STAGES),
}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per case: checkpoints/ is portable, native/ is DeepSpeed's, of the same step."""
    root = tmp_path_factory.mktemp("native")
    corpus = make_corpus(root / "corpus")
    # odd widths, so that nothing divides evenly over data ranks
    odd = {"model__ffn": 78, "model__vocab_multiple": 37, "training__steps": 2, "training__dry_run": False}
    for world_size in sorted({ranks for ranks, _ in CASES.values()}):
        runs = [
            tiny_run(corpus, root / name, **(odd | change)) for name, (n, change) in CASES.items() if n == world_size
        ]
        endings = run_in_sets(run_and_save, world_size, runs)
        assert endings == [["finished"] * len(runs)] * world_size
    return root


@pytest.mark.parametrize("name", [name for name in CASES if name != "frozen_bf16"])
def test_the_same_bits(root: Path, name: str, tmp_path: Path) -> None:
    """Prevents a partition split at the wrong element, swapped tensor shards, and bf16 weights in place of masters."""
    portable, native = open_source(root / name), open_source(root / name / "native")
    assert native.kind == "deepspeed" and native.step == portable.step == 2 and native.notes == ()
    assert (native.model, native.recycle, native.seq_length) == (portable.model, portable.recycle, portable.seq_length)
    assert dict(native.shapes) == dict(portable.shapes)
    for tensor, shape in native.shapes.items():
        assert native.dtype(tensor) == torch.float32
        for kind in KINDS:
            assert native.has(tensor, kind) == portable.has(tensor, kind), f"{kind} of {tensor}"
            if native.has(tensor, kind):
                expected = portable.read(tensor, kind)
                assert torch.equal(native.read(tensor, kind), expected), f"{kind} of {tensor}"
                axis, start = len(shape) - 1, shape[-1] // 3
                part = native.read(tensor, kind, axis, start, shape[-1] // 2)
                assert torch.equal(part, expected.narrow(axis, start, shape[-1] // 2)), f"{kind} of {tensor}"
    if name in ("zero1", "pp2_tp2"):
        result = convert(str(root / name / "native"), str(tmp_path / "out"), Conversion("portable"))
        assert all(torch.equal(result.read(tensor), portable.read(tensor)) for tensor in portable.shapes)
        assert (result.step, result.tokenizer) == (2, tmp_path / "out" / "tokenizer.json")


def test_weights_have_moved(root: Path) -> None:
    """Prevents the comparison above from comparing initial weights, which are equal without any checkpoint."""
    from recycle_ds.model.initialisation import initial_tensor

    native = open_source(root / "zero3_bf16" / "native")
    for name, shape in native.shapes.items():
        assert not torch.equal(native.read(name), initial_tensor(name, shape, native.model, 1234)), name


def test_frozen_bf16_weights_are_reported(root: Path) -> None:
    """Prevents weights that DeepSpeed saved only in bf16 from being reported as master weights."""
    portable, native = open_source(root / "frozen_bf16"), open_source(root / "frozen_bf16" / "native")
    assert len(native.notes) == 1 and "tensors are in bfloat16" in native.notes[0]
    for name in native.shapes:
        frozen = not name.startswith("recycle.")
        assert native.dtype(name) == (torch.bfloat16 if frozen else torch.float32), name
        assert torch.equal(native.read(name), portable.read(name).to(native.dtype(name))), name


THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero2": ("llama_tied", {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}),
    "zero3": ("qwen2", {"zero_optimization": {"stage": 3, "sub_group_size": 5000}}),
    "zero1_head_norms": ("qwen3", {"zero_optimization": {"stage": 1}}),
    "zero2_unrotated": ("smollm3", {"zero_optimization": {"stage": 2}}),
    "zero3_bf16": ("llama", {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per run, as transformers' trainer saves them."""
    root = tmp_path_factory.mktemp("theirs")
    runs = [TheirRun(family, root / name / "checkpoint-3", config) for name, (family, config) in THEIRS.items()]
    run_ranks(train_theirs, 2, runs)
    return root


@pytest.mark.parametrize("name", THEIRS)
def test_hugging_face_models(theirs: Path, name: str, tmp_path: Path) -> None:
    """Prevents wrong logits of a converted model with reordered groups, tied heads or sub-groups."""
    from transformers import AutoModelForCausalLM

    checkpoint = theirs / name / "checkpoint-3"
    masters = torch.load(checkpoint / "whole.pt", weights_only=True)
    assert open_source(checkpoint).kind == open_source(checkpoint / "global_step3").kind == "deepspeed"
    convert(str(checkpoint), str(tmp_path / "out"), Conversion("hf"))
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    trained = AutoModelForCausalLM.from_config(converted.config).eval()
    trained.load_state_dict(masters, strict=not converted.config.tie_word_embeddings)
    assert {key: value.tolist() for key, value in converted.named_parameters()} == {
        key: value.tolist() for key, value in masters.items()
    }
    tokens = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(converted(tokens).logits, trained(tokens).logits)
