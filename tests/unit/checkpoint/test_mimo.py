"""Export for vLLM and SGLang: the MiMo layout's equations give our logits and drafts; the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.comparison import compare
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.loading import load_weights
from recycle_ds.checkpoint.portable.writing import write_portable
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.checkpoint.sources import Source
from recycle_ds.config import RecycleConfig
from recycle_ds.data.loader import Batch
from recycle_ds.model import RecycleGPT, build_model
from tests.unit.checkpoint.conversion_cases import TOKENIZER_FILES, model_folder, one_line_error, run_tool
from tests.unit.checkpoint.families import make, save
from tests.unit.checkpoint.memory import ModelSource
from tests.unit.checkpoint.mimo_reference import MimoReference

FITTING = ("llama", "smollm2", "llama3_rope", "linear_rope", "mistral", "qwen2", "qwen2_tied")


def with_module(folder: Path, name: str, *, layers: int = 1, depth: int = 2) -> RecycleGPT:
    """Writes folder/portable: a model with a module. Norms and biases are random, so that swapped ones are found."""
    save(name, folder / "base")
    conversion = Conversion("portable", recycle_layers=layers, recycle_depth=depth)
    fresh = convert(str(folder / "base"), str(folder / "fresh"), conversion)
    model = build_model(fresh.model, fresh.recycle, seed=None).eval()
    load_weights(model, fresh)
    generator = torch.Generator().manual_seed(3)
    assert model.recycle is not None
    with torch.no_grad():
        for parameter in model.recycle.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
            if parameter.dim() == 1:
                parameter.add_(1)
    (folder / "portable").mkdir()
    source = ModelSource(model, fresh.model, fresh.recycle, folder)
    write_portable(source, folder / "portable", None, 2**30, lambda _: None)
    return model


def tokens(count: int = 40) -> Tensor:
    return torch.randint(300, (count,), generator=torch.Generator().manual_seed(1))


def our_states(model: RecycleGPT, ids: Tensor) -> list[Tensor]:
    """h, r^1 .. r^K of a sequence, [S, D] each, for the positions that have all the tokens that are read."""
    size = len(ids) - model.depth
    ahead = torch.stack([ids[None, depth : depth + size] for depth in range(model.depth + 1)])
    positions = torch.arange(size)[None]
    with torch.no_grad():
        found = model.states(Batch(ahead[0], positions, torch.zeros_like(positions), ahead, ahead))
    return [state[:, 0] for state in found]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FITTING)
def test_the_layouts_equations_give_our_logits_and_drafts(tmp_path: Path, name: str) -> None:
    """Prevents a head that loads and drafts noise: swapped norms or halves, wrong biases or positions."""
    model = with_module(tmp_path, name)
    convert(str(tmp_path / "portable"), str(tmp_path / "out"), Conversion("vllm"))
    reference, ids = MimoReference(tmp_path / "out"), tokens()
    hidden, first, second = our_states(model, ids)
    size = len(hidden)
    states = reference.after_norm(ids[:size])
    close(reference.logits(states), model.logits(hidden))
    one, two = ids[1 : size + 1], ids[2 : size + 2]
    drafts = reference.head(states, one, zero_first=False)
    close(reference.logits(drafts), model.logits(first))
    close(reference.logits(reference.second_draft(states, one, two)), model.logits(second))
    from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

    base, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(base) is Qwen2ForCausalLM and not report["missing_keys"]
    assert all(key.startswith("model.mtp_layers.0.") for key in report["unexpected_keys"])
    assert base.config.num_nextn_predict_layers == 1 and base.config.architectures == ["MiMoForCausalLM"]
    with torch.no_grad():
        close(base.eval()(ids[None, :size]).logits[0], model.logits(hidden))


def test_position_0_is_the_only_difference_in_the_heads_input(tmp_path: Path) -> None:
    """Prevents another difference to vLLM and SGLang, which zero the head's embedding at position 0, than that one."""
    model = with_module(tmp_path, "llama", depth=1)
    convert(str(tmp_path / "portable"), str(tmp_path / "out"), Conversion("vllm"))
    reference, ids = MimoReference(tmp_path / "out"), tokens()
    hidden, first = our_states(model, ids)
    states, one = reference.after_norm(ids[:-1]), ids[1:]
    zeroed = reference.head(states, one, zero_first=True)
    assert (zeroed[0] - first[0]).abs().max() > 0.1
    assert model.embedding is not None and model.recycle is not None
    with torch.no_grad():  # our module with the same zero
        embedded = model.embedding(one[:, None])
        embedded[0] = 0
        positions = torch.arange(len(one))[:, None]
        rotary = model.rotary(positions, torch.float32)
        from recycle_ds.model.masks import AttentionMask

        mask = AttentionMask(torch.zeros(1, len(one), dtype=torch.long)).at_step(1)
        expected, _ = model.recycle(hidden[:, None], embedded, rotary, mask, ())
    close(reference.logits(zeroed), model.logits(expected[:, 0]))


def test_states_before_the_norm(tmp_path: Path) -> None:
    """Prevents vLLM, which gives the head the states before the final norm, from drafting without its weight."""
    model = with_module(tmp_path, "smollm2", depth=1)
    ids = tokens()
    for name in ("uneven", "even"):
        if name == "even":  # rms(g u) is then rms(g) for every token, and the two heads are equal
            assert model.final_norm is not None
            with torch.no_grad():
                model.final_norm.weight.fill_(1.7)
            source = open_source(tmp_path / "portable")
            (tmp_path / "even").mkdir()
            write_portable(
                ModelSource(model, source.model, source.recycle, tmp_path),
                tmp_path / "even",
                None,
                2**30,
                lambda _: None,
            )
        folder = tmp_path / ("portable" if name == "uneven" else name)
        _, first = our_states(model, ids)
        results = {}
        for before_norm in (False, True):
            out = tmp_path / f"{name}-{before_norm}"
            convert(str(folder), str(out), Conversion("vllm", before_norm=before_norm))
            reference = MimoReference(out)
            states = reference.before_norm(ids[:-1])
            results[before_norm] = reference.head(states, ids[1:], zero_first=False)
            if before_norm:  # the base model and the rest of the head are unchanged
                plain = MimoReference(tmp_path / f"{name}-False").weights
                changed = [key for key in plain if not torch.equal(plain[key], reference.weights[key])]
                assert changed in ([], ["model.mtp_layers.0.hidden_layernorm.weight"])
        if name == "even":
            close(results[True], first)
        else:
            near, far = ((results[folded] - first).norm() / first.norm() for folded in (True, False))
            assert near < 0.1 < 2 * near < far, (near, far)
    with pytest.raises(CheckpointError, match=r"uneven-True: converted with --before-norm, only for vLLM"):
        open_source(tmp_path / "uneven-True")


@pytest.mark.parametrize("name", ["llama", "smollm2", "qwen2"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    """Prevents a folder that cannot be converted back to the same weights and settings, zero biases included."""
    with_module(tmp_path, name, depth=3)
    result = convert(str(tmp_path / "portable"), str(tmp_path / "out"), Conversion("vllm", shard_gib=5e-5))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert compare(tmp_path / "portable", tmp_path / "out")["equal"]
    assert result.recycle == RecycleConfig(layers=1, depth=3)
    convert(str(tmp_path / "out"), str(tmp_path / "back"), Conversion("portable"))
    original, back = open_source(tmp_path / "portable"), open_source(tmp_path / "back")
    assert original.shapes.keys() == back.shapes.keys() and original.recycle == back.recycle
    for key in original.shapes:
        assert torch.equal(original.read(key), back.read(key)), key
    load_weights(build_model(back.model, back.recycle, seed=None), back)


def test_dtypes_and_the_tokenizer(tmp_path: Path) -> None:
    """Prevents fp32 biases in a bf16 model, and a folder without its tokenizer or chat template."""
    source = model_folder(tmp_path / "base", "llama_tied")
    out = tmp_path / "out"
    convert(str(source), str(out), Conversion("vllm", dtype="bf16", recycle_layers=1))
    weights = load_file(out / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    biases = [value for key, value in weights.items() if key.endswith("bias")]
    assert len(biases) == 3 * (3 + 1) and not any(value.any() for value in biases)
    for name in TOKENIZER_FILES:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    tree = json.loads((out / "config.json").read_text())
    expected = {"model_type": "qwen2", "torch_dtype": "bfloat16", "tie_word_embeddings": True}
    expected["eos_token_id"] = [2, 0]  # of config.json and of the tokenizer
    assert {key: tree[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "layers", "parts"),
    [
        ("llama", 0, ["no recycle module", "use --to hf"]),
        ("llama", 2, ["recycle.layers=2: the MTP head has one block", "use --to hf"]),
        ("llama_mha_wide_heads", 1, ["model.head_dim=20", "hidden / heads (48 / 4)", "use --to hf"]),
        ("qwen3", 1, ["model.qk_norm: a Qwen2 block has no such setting", "use --to hf"]),
    ],
)
def test_what_the_layout_cannot_express(tmp_path: Path, name: str, layers: int, parts: list[str]) -> None:
    """Prevents a folder that an engine loads with other equations than the model was trained with."""
    save(name, tmp_path / "base")
    with pytest.raises(CheckpointError) as caught:
        convert(str(tmp_path / "base"), str(tmp_path / "out"), Conversion("vllm", recycle_layers=layers))
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


class WithExtra(ModelSource):
    """A source with one more, or another, tensor in its module."""

    def __init__(self, source: Source, model: RecycleGPT, changed: dict[str, tuple[int, ...]]) -> None:
        super().__init__(model, source.model, source.recycle, source.folder)
        self.shapes = {**self.shapes, **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recycle.tap_norms.0.weight": (48,)}, r"recycle\.tap_norms\.0\.weight: the MTP head has no such tensor"),
        (
            {"recycle.projection.weight": (48, 192)},
            r"projection\.weight \[48, 192\]: the MTP head's takes one state only",
        ),
    ],
)
def test_states_of_several_layers(tmp_path: Path, changed: dict[str, tuple[int, ...]], message: str) -> None:
    """Prevents dropping a part of a module that fuses the states of several layers."""
    from recycle_ds.checkpoint.huggingface.mimo import check_fits

    save("llama", tmp_path / "base")
    source = open_source(tmp_path / "base")
    source.recycle = RecycleConfig(layers=1)
    model = build_model(source.model, source.recycle, seed=0)
    with pytest.raises(CheckpointError, match=message):
        check_fits(WithExtra(source, model, changed))


def test_damaged_folders(tmp_path: Path) -> None:
    """Prevents loading a head as another module than it was, and losing biases that were trained since."""
    out = tmp_path / "out"
    save("llama", tmp_path / "base")
    convert(str(tmp_path / "base"), str(out), Conversion("vllm", recycle_layers=1))
    note, config = out / "recycle.json", out / "config.json"
    tree, settings = json.loads(note.read_text()), json.loads(config.read_text())
    for change, message in (
        ({"format": "recycle_ds module"}, "format 'recycle_ds module', version 1; must be"),
        ({"version": 2}, "version 2; must be"),
        ({"qkv_bias": None}, "qkv_bias=None: must be true or false"),
        ({"recycle": {"layers": 2}}, r"recycle\.layers=2: must be 1"),
        ({"recycle": {"layers": "two"}}, "layers='two'"),
    ):
        note.write_text(json.dumps(tree | change))
        with pytest.raises(CheckpointError, match=message) as caught:
            open_source(out)
        assert "\n" not in str(caught.value)
    note.write_text(json.dumps(tree))
    config.write_text(json.dumps(settings | {"num_nextn_predict_layers": 2}))
    with pytest.raises(CheckpointError, match="num_nextn_predict_layers=2: only one MTP head is supported"):
        open_source(out)
    config.write_text(json.dumps(settings))
    weights = load_file(out / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.bias"][3] = 0.5
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.bias is not zero"):
        open_source(out)
    note.unlink()  # a folder of another program: a Qwen2 model with its head
    source = open_source(out)
    assert source.recycle == RecycleConfig(layers=1) and source.model.qkv_bias


def test_the_command(tmp_path: Path) -> None:
    """Prevents an option without effect, and a user of vLLM who is not told that its head needs another option."""
    save("llama", tmp_path / "base")
    arguments = (tmp_path / "base", tmp_path / "out", "--to", "vllm", "--recycle-layers", 1)
    done = run_tool("convert_checkpoint", *arguments)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "note: vLLM needs --before-norm" in done.stdout and "recycle module of 1 layer(s), vllm" in done.stdout
    described = run_tool("inspect_checkpoint", tmp_path / "out")
    assert described.returncode == 0 and "huggingface" in described.stdout
    done = run_tool("convert_checkpoint", tmp_path / "out", tmp_path / "folded", "--to", "vllm", "--before-norm")
    assert done.returncode == 0 and "note: for vLLM only" in done.stdout
    refused = run_tool("inspect_checkpoint", tmp_path / "folded")
    assert "converted with --before-norm" in one_line_error(refused)
    refused = run_tool("convert_checkpoint", tmp_path / "out", tmp_path / "more", "--to", "hf", "--before-norm")
    assert "--before-norm --to hf: only with --to vllm" in one_line_error(refused)
    text = run_tool("convert_checkpoint", "--help").stdout
    assert "vllm" in text and "--before-norm" in text


def test_a_plain_folder_lists_the_base_models_files_only(tmp_path: Path) -> None:
    """Prevents vLLM and SGLang from reading the module's file with the base model, as they do without an index."""
    make("llama").save_pretrained(tmp_path / "base")
    convert(str(tmp_path / "base"), str(tmp_path / "with"), Conversion("hf", recycle_layers=1))
    table = json.loads((tmp_path / "with" / "model.safetensors.index.json").read_text())
    assert set(table["weight_map"].values()) == {"model.safetensors"}
    assert table["weight_map"].keys() == load_file(tmp_path / "with" / "model.safetensors").keys()
    convert(str(tmp_path / "base"), str(tmp_path / "without"), Conversion("hf"))
    assert not (tmp_path / "without" / "model.safetensors.index.json").exists()
