"""Compiled training: one graph per block, per unrolled step of the module and per chunk of the losses, equal to eager."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.data.loader import Batch
from recycle_ds.data.targets import make_targets
from recycle_ds.model import RecycleGPT, attention, build_model, masks
from recycle_ds.model.losses.fused import FusedLosses
from recycle_ds.parallel.agree import on_all_ranks
from recycle_ds.parallel.compiler import RECOMPILE_LIMIT
from recycle_ds.parallel.mesh import Axis, Mesh
from recycle_ds.training.engine.compiling import BLOCKS, FUNCTIONS, choose, compile_regions, why_not
from recycle_ds.training.errors import TrainingError

CONFIG = ModelConfig(layers=3, hidden=64, heads=4, kv_heads=2, ffn=96, vocab_size=131, max_positions=64)
ROWS, LENGTH, CHUNK = 3, 40, 50
VARIANTS = {
    "backbone": RecycleConfig(layers=0),
    "depth 1": RecycleConfig(layers=1),
    "depth 3, taps": RecycleConfig(layers=2, depth=3, taps=(0, 1)),
    "kl, confidence": RecycleConfig(layers=1, depth=3, objective="kl", confidence=True, gradient="detached"),
    "acceptance, frozen": RecycleConfig(layers=1, depth=2, objective="acceptance", gradient="frozen_backbone"),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch_of(depth: int, *, packed: bool, seed: int = 5, rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(131, (rows, LENGTH + 1), generator=generator)
    documents, positions = torch.zeros_like(tokens), torch.arange(LENGTH + 1).expand(rows, -1).clone()
    if packed:
        documents[:, 13:] = 1
        positions[:, 13:] -= 13
    targets = make_targets(tokens, documents, depth)
    single = not packed
    positions, documents = positions[:, :-1].contiguous(), documents[:, :-1].contiguous()
    return Batch(targets.inputs[0], positions, documents, targets.inputs, targets.targets, single)


def gradients_of(model: RecycleGPT, batch: Batch) -> tuple[float, list[Tensor]]:
    for parameter in model.parameters():
        parameter.grad = None
    total, _ = model.train_losses(batch, torch.full((1 + model.depth,), 0.01))
    total.backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return total.item(), [torch.zeros(()) if gradient is None else gradient.clone() for gradient in found]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).norm().item() <= tolerance * other.norm().item() + 1e-7


@pytest.mark.parametrize(
    ("variant", "recompute"),
    [("backbone", False), ("depth 3, taps", True), ("kl, confidence", False), ("acceptance, frozen", True)],
)
def test_no_graph_break(variant: str, recompute: bool) -> None:
    """Prevents a graph break in a block, the module or the losses (`fullgraph` raises at one), a compiled result that differs,
    and code that is compiled once per layer or per batch."""
    recycle, counter = VARIANTS[variant], CompileCounterWithBackend("eager")
    eager, compiled = (
        build_model(CONFIG, recycle, seed=3, checkpoint_blocks=recompute, loss_chunk=CHUNK) for _ in range(2)
    )
    compile_regions(compiled, BLOCKS, counter)
    for packed in (False, True):
        batch = batch_of(compiled.depth, packed=packed)
        (loss, actual), (expected_loss, expected) = gradients_of(compiled, batch), gradients_of(eager, batch)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert_close(actual, expected, 1e-4)
        compiled.evaluate(batch)
    found = counter.frame_count
    assert found <= RECOMPILE_LIMIT // 2
    for packed in (False, True):  # a further step finds all code compiled
        again = batch_of(compiled.depth, packed=packed, seed=6)
        gradients_of(compiled, again)
        compiled.evaluate(again)
    assert counter.frame_count == found, "compiled again for another batch of the same shape"


def test_compiled_code_is_shared_by_blocks() -> None:
    """Prevents a compile time that grows with the number of layers."""
    counts = []
    for layers in (2, 6):
        torch._dynamo.reset()
        model = build_model(CONFIG.model_copy(update={"layers": layers}), RecycleConfig(layers=0), seed=3)
        counter = CompileCounterWithBackend("eager")
        compile_regions(model, BLOCKS, counter)
        gradients_of(model, batch_of(0, packed=True))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("recycle", [VARIANTS["depth 3, taps"], VARIANTS["kl, confidence"]])
def test_functions_alone(recycle: RecycleConfig) -> None:
    """Prevents a compiled part that differs where blocks cannot be compiled: with tensor parallelism and ZeRO 3."""
    config = CONFIG.model_copy(update={"qk_norm": True})
    eager, compiled = (build_model(config, recycle, seed=3, loss_chunk=CHUNK) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compile_regions(compiled, FUNCTIONS, counter)
    batch = batch_of(3, packed=True)
    (loss, actual), (expected_loss, expected) = gradients_of(compiled, batch), gradients_of(eager, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close(actual, expected, 1e-4)
    assert counter.frame_count >= 4


def test_bf16_stays_close() -> None:
    """Prevents a compiled path that loses precision in bf16: the losses' gradients stay fp32 until they are complete."""
    recycle = VARIANTS["depth 1"]
    eager, compiled = (build_model(CONFIG, recycle, seed=3, dtype=torch.bfloat16, loss_chunk=CHUNK) for _ in range(2))
    compile_regions(compiled, BLOCKS, "aot_eager")
    batch = batch_of(1, packed=True)
    (loss, actual), (expected_loss, expected) = gradients_of(compiled, batch), gradients_of(eager, batch)
    assert loss == pytest.approx(expected_loss, rel=2e-3)
    assert_close([one.float() for one in actual], [one.float() for one in expected], 2e-2)


@pytest.mark.parametrize("depth", [3])
def test_flex_attention_is_part_of_the_graph(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a graph break at FlexAttention or at its block mask, a mask that is built in every layer, and a new compilation
    for every batch's documents. The path of a GPU, traced on the CPU: PyTorch refuses gradients there, but can compute them."""

    def through_flex(query: Tensor, keys: Tensor, values: Tensor, mask: masks.AttentionMask) -> Tensor:
        return attention.flex(query, keys, values, mask, compiled=False)

    def with_blocks(mask: masks.AttentionMask, dtype: torch.dtype) -> masks.AttentionMask:
        _ = mask.block_mask
        return mask

    model = build_model(CONFIG, RecycleConfig(layers=1, depth=depth), seed=3)
    batch = batch_of(depth, packed=True)
    expected = gradients_of(model, batch)[1]
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention, "attend", through_flex)
    monkeypatch.setattr(masks.AttentionMask, "prepare", with_blocks)
    counter = CompileCounterWithBackend("eager")
    compile_regions(model, BLOCKS, counter)
    assert_close(gradients_of(model, batch)[1], expected, 1e-4)
    found = counter.frame_count
    gradients_of(model, replace(batch_of(depth, packed=True, seed=6), documents_BS=batch.documents_BS + 1))
    assert counter.frame_count == found
    graphs: list[Any] = counter.graphs
    assert not any("argsort" in str(node.target) for graph in graphs for node in graph.graph.nodes)
    calls = [sum(str(node.target) == "flex_attention" for node in graph.graph.nodes) for graph in graphs]
    assert sum(calls) == 1 + depth, "one in the blocks' shared graph, one in each unrolled step"


@pytest.mark.parametrize("padding", [0, 3])
def test_fused_cross_entropy_reads_the_logits_once(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a compiled loss that writes fp32 logits to memory: it may read the logits' and write their gradient's bytes."""
    from torch._inductor import metrics

    rows, columns = 64, 4096
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, columns, generator=generator).bfloat16()
    targets = torch.randint(columns - padding, (rows,), generator=generator)
    targets[3] = -100
    weight = torch.tensor(0.5)

    def compiler(function: Any) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=False)

    metrics.reset()
    loss, error = FusedLosses.compiled(compiler).cross_entropy(logits, targets, weight, columns - padding)
    reference = logits[:, : columns - padding].float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(reference, targets, reduction="none", ignore_index=-100)
    (expected.sum() * weight).backward()
    assert reference.grad is not None
    assert torch.allclose(loss, expected.detach(), atol=1e-4)
    assert torch.allclose(error[:, : columns - padding].float(), reference.grad, atol=1e-3)
    assert not error[:, columns - padding :].any() and not error[3].any()
    assert metrics.num_bytes_accessed <= 9 * logits.numel(), metrics.num_bytes_accessed / logits.numel()


def test_when_training_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents compilation on a CPU that nobody asked for, blocks compiled around hooks or asynchronous collectives, and a
    GPU without Triton or a C compiler that fails at the first step or that is slow without a word."""
    from recycle_ds.training.engine import compiling

    cpu, cuda, two = Mesh(), Mesh(device=torch.device("cuda")), Axis(0, 2)
    monkeypatch.setattr(compiling, "why_not", lambda device: "")
    monkeypatch.setattr(compiling, "on_all_ranks", lambda action, mesh: on_all_ranks(action, Mesh()))
    assert choose("auto", cpu, 1).regions == "" == choose(False, cuda, 1).regions
    assert choose("auto", cuda, 1).regions == choose(True, cpu, 1).regions == BLOCKS
    assert choose("auto", cuda, 3).regions == FUNCTIONS
    assert choose("auto", replace(cuda, tensor=two), 1).regions == FUNCTIONS
    assert "pipeline" in choose("auto", replace(cuda, pipeline=two), 1).report()
    monkeypatch.setattr(compiling, "why_not", lambda device: "no C compiler")
    assert choose("auto", cuda, 1).report().startswith("not compiled: no C compiler; ")
    with pytest.raises(TrainingError, match=r"training\.compile=true: no C compiler; .* training\.compile=false"):
        choose(True, cuda, 1)
    assert choose("auto", cpu, 1).report() == ""


def test_a_rank_without_triton_asks_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents ranks that wait for ever for one whose host has no Triton: it left before they agreed."""
    from recycle_ds.training.engine import compiling

    asked: list[Mesh] = []

    def agree(action: Callable[[], None], mesh: Mesh) -> None:
        asked.append(mesh)
        on_all_ranks(action, Mesh())

    monkeypatch.setattr(compiling, "on_all_ranks", agree)
    monkeypatch.setattr(compiling, "has_triton", lambda: False)
    cuda = Mesh(device=torch.device("cuda"))
    assert choose("auto", cuda, 1).report().startswith("not compiled: Triton is missing")
    assert asked == [cuda]


def test_a_compiler_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a check that finds no fault, and a reason that is a traceback of many lines."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("\nFailed to find C compiler.\nSet CC.")

    monkeypatch.setattr(torch, "compile", broken)
    assert why_not(torch.device("cpu")) == "code for cpu cannot be compiled (Failed to find C compiler.)"

    def failing(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(1, ["gcc", "/tmp/" + "x" * 300])

    monkeypatch.setattr(torch, "compile", failing)
    assert why_not(torch.device("cpu")).endswith("failed with status 1: are Python's headers installed?)")

    def nested(*_: object, **__: object) -> None:
        raise RuntimeError("backend='inductor' raised:\nOSError: [Errno 30] Read-only file system")

    monkeypatch.setattr(torch, "compile", nested)
    assert why_not(torch.device("cpu")).endswith("(OSError: [Errno 30] Read-only file system)")


def test_the_trial_counts_as_no_graph_of_the_model() -> None:
    """Prevents a report of compiled graphs where nothing of the model is compiled: the trial has a graph of its own."""
    before = counters["stats"]["unique_graphs"]
    assert why_not(torch.device("cpu")) == ""
    assert counters["stats"]["unique_graphs"] == before
