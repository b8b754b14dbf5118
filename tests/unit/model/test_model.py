"""The model, compared with slow references: Hugging Face's LLaMA, a manually unrolled module, other back ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recycle_ds.config import ModelConfig, RecycleConfig, RopeConfig, RopeScaling
from recycle_ds.data.loader import Batch
from recycle_ds.data.targets import make_targets
from recycle_ds.model import build_model
from recycle_ds.model.attention import dense, flex
from recycle_ds.model.flops import parameters
from recycle_ds.model.initialisation import initial_tensor
from recycle_ds.model.masks import AttentionMask
from recycle_ds.model.sharding import canonical_shapes, pieces
from recycle_ds.parallel.mesh import Mesh

VOCAB = 100


def model_config(**changes: object) -> ModelConfig:
    sizes = {"layers": 2, "hidden": 48, "heads": 4, "kv_heads": 2, "ffn": 80, "vocab_size": VOCAB, "max_positions": 64}
    return ModelConfig.model_validate(sizes | {"init_std": 0.2} | changes)


def batch_of(rows: int, length: int, depth: int, boundary: int | None = None) -> Batch:
    """Random tokens; the last row has a second document from `boundary` on."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (rows, length + 1), generator=generator)
    documents = torch.zeros_like(tokens)
    positions = torch.arange(length).repeat(rows, 1)
    if boundary is not None:
        documents[-1, boundary:] = 1
        positions[-1, boundary:] -= boundary
    targets = make_targets(tokens, documents, depth)
    return Batch(tokens[:, :-1], positions, documents[:, :-1], targets.inputs, targets.targets)


@pytest.mark.parametrize("change", [{}, {"tied_embeddings": False}, {"kv_heads": 4}, {"head_dim": 16}])
def test_logits_equal_hugging_face(change: dict[str, object]) -> None:
    """Prevents a rotation, norm, projection order or activation that differs from the LLaMA family's."""
    transformers = pytest.importorskip("transformers")
    config = model_config(**change)
    model = build_model(config, RecycleConfig(layers=0), seed=3)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=config.kv_heads, head_dim=config.dim_per_head, max_position_embeddings=64,
            rms_norm_eps=config.norm_epsilon, rope_theta=10_000.0, tie_word_embeddings=config.tied_embeddings,
            attention_bias=False,
        )
    )  # fmt: skip
    names = {"embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
    names["head.weight"] = "lm_head.weight"
    parts = {
        "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj", "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    }  # fmt: skip
    state: dict[str, Tensor] = {}
    for name, shape in canonical_shapes(pieces(model, Mesh())).items():
        value = initial_tensor(name, shape, config, 3)
        if name in names:
            state[names[name]] = value
        else:
            _, layer, rest = name.split(".", 2)
            state[f"model.layers.{layer}.{parts[rest.removesuffix('.weight')]}.weight"] = value
    reference.load_state_dict(state, strict=config.tied_embeddings is False)
    batch = batch_of(2, 20, 0)
    with torch.no_grad():
        actual = model.logits(model.states(batch)[0]).transpose(0, 1)
        expected = reference(batch.tokens_BS).logits
    assert torch.allclose(actual, expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_rope_scaling_equals_hugging_face(kind: str) -> None:
    """Prevents scaled frequencies that differ from those with which a checkpoint was trained."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from recycle_ds.model.rope import frequencies

    scaling = {"rope_type": kind, "factor": 8.0, "rope_theta": 500_000.0}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=2048, rope_parameters=scaling
    )
    if kind == "linear":
        expected = 1.0 / (500_000.0 ** (torch.arange(0, 32, 2) / 32)) / 8.0
    else:
        expected, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    actual = frequencies(
        32, RopeConfig(theta=500_000.0, scaling=RopeScaling(kind=kind, factor=8.0, original_positions=256))
    )
    assert torch.allclose(actual.float(), expected.float(), rtol=1e-5)


def test_documents_do_not_see_each_other() -> None:
    """Prevents states of a packed document that depend on its neighbour, in the backbone or in an unrolled step."""
    model = build_model(model_config(), RecycleConfig(layers=1, depth=3), seed=3).eval()
    packed = batch_of(1, 24, 3, boundary=10)
    second = Batch(
        packed.tokens_BS[:, 10:], packed.positions_BS[:, 10:], packed.documents_BS[:, 10:] - 1,
        packed.inputs_KBS[:, :, 10:], packed.targets_KBS[:, :, 10:],
    )  # fmt: skip
    with torch.no_grad():
        for depth, (together, alone) in enumerate(zip(model.states(packed), model.states(second), strict=True)):
            usable = slice(0, 14 - depth)
            assert torch.allclose(together[10:][usable], alone[usable], atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_flex_attention_equals_dense(steps: int) -> None:
    """Prevents two back ends from interpreting the same mask differently."""
    generator = torch.Generator().manual_seed(2)
    documents = torch.tensor([[0] * 32, [0] * 10 + [1] * 22])
    query = torch.randn(2, 4, 32, 16, generator=generator)
    keys, values = (torch.randn(2, 2, 32 * steps, 16, generator=generator) for _ in range(2))
    mask = AttentionMask(documents, steps)
    assert torch.allclose(flex(query, keys, values, mask, compiled=False), dense(query, keys, values, mask), atol=1e-5)


def test_checkpointed_blocks_change_nothing() -> None:
    """Prevents recomputation that appends a step's keys twice or skips a gradient."""
    results = []
    for recompute in (False, True):
        model = build_model(model_config(), RecycleConfig(layers=1, depth=3), seed=3, checkpoint_blocks=recompute)
        total, _ = model.train_losses(batch_of(2, 20, 3, boundary=7), torch.tensor([1.0, 0.5, 0.3, 0.2]))
        total.backward()
        results.append((total.item(), [parameter.grad for parameter in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(
        a is not None and b is not None and torch.equal(a, b) for a, b in zip(*(r[1] for r in results), strict=True)
    )


def test_gradient_modes_reach_the_right_weights() -> None:
    """Prevents a recycle loss that reaches the backbone in detached mode, or only the module in joint mode."""
    scales = torch.tensor([0.0, 1.0, 1.0])
    touched = {}
    for mode in ("joint", "detached", "frozen_backbone"):
        model = build_model(model_config(), RecycleConfig(layers=1, depth=2, gradient=mode), seed=3)
        total, _ = model.train_losses(batch_of(2, 20, 2), scales)
        total.backward()
        touched[mode] = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    module = {name for name in touched["joint"] if name.startswith("recycle.")}
    assert touched["detached"] == module
    assert {"embedding.weight", "blocks.0.mlp.down.weight", "final_norm.weight"} <= touched["joint"]


def test_acceptance_counts_agreement_with_the_backbone() -> None:
    """Prevents acceptance that is measured against the data, or is one position off."""
    model = build_model(model_config(), RecycleConfig(layers=1, depth=2), seed=3).eval()
    batch = batch_of(2, 20, 2)
    sums = model.evaluate(batch)
    with torch.no_grad():
        best = [model.logits(state).argmax(-1) for state in model.states(batch)]
    agreed, judged = [0, 0], [0, 0]
    for row in range(2):
        for start in range(20):
            for depth in (1, 2):
                if start + depth >= 20:
                    break
                judged[depth - 1] += 1
                if best[depth][start, row] != best[0][start + depth, row]:
                    break
                agreed[depth - 1] += 1
    assert sums.agreed[1:].tolist() == agreed
    assert sums.judged[1:].tolist() == judged


@pytest.mark.parametrize("tied", [True, False])
def test_pieces_tile_the_canonical_tensors(tied: bool) -> None:
    """Prevents rows of a canonical tensor that no piece or two pieces cover, and a wrong parameter count."""
    config = model_config(tied_embeddings=tied, qkv_bias=True, vocab_multiple=64)
    recycle = RecycleConfig(layers=2)
    model = build_model(config, recycle, seed=None)
    table = pieces(model, Mesh())
    assert table.keys() == dict(model.named_parameters()).keys()
    shapes = canonical_shapes(table)
    found = [piece for row in table.values() for piece in row]
    assert all(piece.whole for piece in found)
    assert sorted(piece.name for piece in found) == sorted(shapes)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert total == parameters(config, recycle)
    assert shapes["embedding.weight"] == (VOCAB, 48)


def test_initial_weights_depend_on_the_name_alone() -> None:
    """Prevents initial weights that change when layers are added, or that two tensors share."""
    small = build_model(model_config(layers=1), RecycleConfig(layers=0), seed=3)
    large = build_model(model_config(layers=1), RecycleConfig(layers=2), seed=3)
    others = dict(large.named_parameters())
    assert all(torch.equal(parameter, others[name]) for name, parameter in small.named_parameters())
    gate_up = others["blocks.0.mlp.gate_up.weight"]
    assert not torch.equal(gate_up[:80], gate_up[80:])
    assert not torch.equal(others["blocks.0.mlp.down.weight"], others["recycle.blocks.0.mlp.down.weight"])


def test_rotation_has_the_right_gradient() -> None:
    """Prevents a manual backward pass that rotates in the wrong direction."""
    from recycle_ds.model.rope import Rotary, rotate

    rotary = Rotary(6, 16, RopeConfig(theta=100.0))
    angles = rotary(torch.tensor([[0, 3], [5, 1], [7, 15]]), torch.float64)
    x = torch.randn(3, 2, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: rotate(value, angles), (x,))
    with torch.no_grad():
        assert torch.equal(rotate(x, angles), rotate(x.detach().requires_grad_(False), angles))
        assert torch.allclose(rotate(x, angles).norm(dim=-1), x.norm(dim=-1))
