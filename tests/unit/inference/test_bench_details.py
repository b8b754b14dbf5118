"""The details of a comparison: figures by kind of prompt, time by part, quality of `alternate`, and other programs."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.data.errors import DataError
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference import Decoder, DecodingError
from recycle_ds.inference.bench import tables
from recycle_ds.inference.bench.bench_prompts import BenchPrompt, read_bench_prompts
from recycle_ds.inference.bench.comparison import BenchSettings, bench_model, run_bench
from recycle_ds.inference.bench.held_out import HELD_OUT, held_out_prompts
from recycle_ds.inference.bench.parts import PARTS, time_by_part
from recycle_ds.inference.bench.peers import PEERS, PeerRequest, check_peers, open_peers
from recycle_ds.inference.bench.plots import plot_decoding
from recycle_ds.inference.bench.quality import mean_log_likelihood, quality
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.model import RecycleGPT
from tests.unit.checkpoint.conversion_cases import model_folder
from tests.unit.inference.models import next_logits, random_model
from tests.unit.inference.native.kernels import bf16_model, needs_kernels

TEXTS = [prompt["prompt"] for prompt in held_out_prompts()]
PROMPTS = [BenchPrompt([1, 2, 3], "chat"), BenchPrompt([4, 4], "code"), BenchPrompt([0], "chat")]


def test_the_details_are_those_of_the_texts(tmp_path: Path) -> None:
    """Prevents figures of a kind that count other prompts, times that do not add up, and a table or plot that fails on them."""
    model = random_model(6, 1)
    decoder = Decoder(model)
    settings = BenchSettings(max_new_tokens=12, draft_tokens=2, repeats=2, details=True)
    report = run_bench(decoder, PROMPTS, settings, model="m", dtype="fp32").report
    assert list(report)[:5] == ["modes", "model", "dtype", "threads", "machine"]
    assert report["settings"] == {
        "max_new_tokens": 12,
        "draft_tokens": 2,
        "repeats": 2,
        "temperature": 0.0,
        "seed": None,
    }
    for mode, figures in report["modes"].items():
        assert {kind: one["prompts"] for kind, one in figures["kinds"].items()} == {"chat": 2, "code": 1}
        parts = figures["milliseconds_per_token"]
        assert set(parts) == {*PARTS, "total"} and parts["total"] == pytest.approx(sum(parts[name] for name in PARTS))
        assert parts["full_call"] > 0 and parts["head"] > 0 and parts["host"] > 0
        assert (parts["module"] > 0) is (mode != "autoregressive"), mode
    for one in report["modes"]["autoregressive"]["kinds"].values():
        assert one["speedup"] == 1.0 == one["tokens_per_full_call"]
    # the same prompts alone, so that nothing of another kind can be counted
    alone = run_bench(Decoder(model), PROMPTS[1:2], settings, model="m", dtype="fp32").report["modes"]["verified"]
    code = report["modes"]["verified"]["kinds"]["code"]
    assert (code["acceptance"], code["tokens_per_full_call"]) == (alone["acceptance"], alone["tokens_per_full_call"])
    assert report["modes"]["verified"]["divergences"] == []
    console = Console(width=160, file=StringIO())
    for table in (tables.kinds_table(report), tables.acceptance_table(report), tables.parts_table(report)):
        assert table is not None
        console.print(table)
    assert len(tables.quality_notes(report)) == 1 and "agreement" in tables.quality_notes(report)[0]
    report["peers"] = {"llama.cpp": report["modes"]["autoregressive"] | {"version": "1", "dtype": "bf16"}}
    plot_decoding(report, tmp_path / "decoding.png")
    assert imread(tmp_path / "decoding.png").shape[1] > 1500


def test_timers_are_removed_from_the_engine() -> None:
    """Prevents an engine that stays slow, or keeps adding up times, after it was timed by part."""
    decoder = Decoder(random_model(6, 1))
    runner = decoder.engine._executor._runner  # type: ignore[attr-defined]
    owners = (runner, runner._weights, runner._drafter)
    before = [dict(vars(owner)) for owner in owners]
    time_by_part(decoder.engine, [[1, 2]], "verified", SamplingParams(max_new_tokens=6, draft_tokens=2))
    after = [dict(vars(owner)) for owner in owners]
    assert [set(one) for one in before] == [set(one) for one in after]
    assert all(before[1][name] is after[1][name] for name in ("head", "draft_head", "module"))


@needs_kernels
def test_the_parts_of_compiled_calls_are_told_apart() -> None:
    """Prevents full calls and calls of the module that count as the host's work, as timers on other methods would."""
    decoder = Decoder(bf16_model(vocab_size=45, hidden=64, taps=(0,)))
    found = time_by_part(decoder.engine, [[1, 2, 3]], "verified", SamplingParams(max_new_tokens=12, ignore_eos=True))
    assert found["full_call"] > 0 and found["module"] > 0 and found["head"] > 0


def _likelihood(model: RecycleGPT, prompt: Sequence[int], text: Sequence[int]) -> float:
    """Sum of log p over a text, token by token."""
    total = 0.0
    for number, token in enumerate(text):
        total += float(next_logits(model, [*prompt, *text[:number]]).log_softmax(-1)[token])
    return total


def test_the_quality_of_a_text_is_measured_by_the_full_model() -> None:
    """Prevents a log-likelihood of the wrong tokens, and an agreement that counts what follows the first difference."""
    model = random_model(6, 1)
    prompts, texts = [[1, 2, 3], [0]], [(4, 1, 1), (2, 5)]
    expected = sum(_likelihood(model, *pair) for pair in zip(prompts, texts, strict=True)) / 5
    assert mean_log_likelihood(model, prompts, texts) == pytest.approx(expected, abs=1e-5)
    found = quality(model, [[1], [1], [1]], [(1, 2, 3, 4), (5, 5), (1, 1)], [(1, 2, 0, 4), (0, 5), (1, 1, 3)])
    assert found["tokens_before_divergence"] == pytest.approx((2 + 0 + 2) / 3)
    assert found["agreement"] == pytest.approx(4 / 6)


def test_sampled_texts_are_compared_by_seed_only() -> None:
    """Prevents a lossless mode from being reported as lossy because each mode samples a text of its own."""
    model = random_model(6, 1)
    for seed, same in ((3, True), (None, None)):
        settings = BenchSettings(max_new_tokens=12, repeats=1, temperature=0.8, seed=seed, details=True)
        result = run_bench(Decoder(model), PROMPTS, settings, model="m", dtype="fp32")
        assert result.report["modes"]["verified"]["identical_to_autoregressive"] is same
        assert "divergences" not in result.report["modes"]["verified"]
        assert ("agreement" in result.report["modes"]["alternate"]["quality"]) is (same is True)
        assert ("agreement" in tables.quality_notes(result.report)[0]) is (same is True)
        assert not any("diverges" in note for note in result.notes)
    with pytest.raises(DecodingError, match="temperature=-1"):
        BenchSettings(temperature=-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Hugging Face folder with a recycle module."""
    root = tmp_path_factory.mktemp("peers")
    model_folder(root / "plain")
    # every id of the model's 300 has a token: ids without one are chosen by transformers, and never by us
    Tokenizer.train(TEXTS, 300).save(root / "plain")
    convert(str(root / "plain"), str(root / "model"), Conversion("hf", recycle_layers=1, seed=1))
    return root / "model"


def test_transformers_writes_the_same_texts(folder: Path, tmp_path: Path) -> None:
    """Prevents a peer that is given other tokens, another length or another end than our modes."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a tale", "kind": "prose"}\n{"prompt": "two cities", "kind": "prose"}\n')
    settings = BenchSettings(("autoregressive",), max_new_tokens=8, repeats=1, details=True)
    request = PeerRequest.parse("transformers,prompt_lookup")
    report = bench_model(str(folder), file, settings, dtype="fp32", threads=1, peers=request).report
    assert list(report["peers"]) == ["transformers", "prompt_lookup"]
    for figures in report["peers"].values():
        assert figures["identical_to_autoregressive"] is True and figures["dtype"] == "fp32"
        assert (
            figures["new_tokens"] == report["modes"]["autoregressive"]["new_tokens"]
            and figures["tokens_per_second"] > 0
        )
        assert figures["kinds"]["prose"]["prompts"] == 2
    assert report["peers"]["prompt_lookup"]["prompt_lookup_num_tokens"] == 10
    sampled = BenchSettings(("autoregressive",), max_new_tokens=4, repeats=1, temperature=0.7, seed=1)
    found = bench_model(str(folder), file, sampled, dtype="fp32", threads=1, peers=request).report["peers"]
    assert [one["new_tokens"] for one in found.values()] == [8, 8]
    assert [one["identical_to_autoregressive"] for one in found.values()] == [None, None], (
        "their random numbers are others"
    )


def test_peers_that_cannot_be_used_are_named(folder: Path, tmp_path: Path) -> None:
    """Prevents a comparison that silently lacks a program that was asked for, or fails because of one that was not."""
    with pytest.raises(DecodingError, match=r"did you mean llama\.cpp"):
        PeerRequest.parse("lama.cpp")
    with pytest.raises(DecodingError, match="no such file"):
        PeerRequest.parse("llama.cpp", tmp_path / "no.gguf")
    with pytest.raises(DecodingError, match=r"peer llama\.cpp: .*(is not installed|give --gguf FILE)"):
        check_peers(PeerRequest.parse("llama.cpp"), folder)
    with pytest.raises(DecodingError, match=r"peer transformers: .* not a Hugging Face folder"):
        check_peers(PeerRequest.parse("transformers"), tmp_path)
    with pytest.raises(DecodingError, match=r"peer llama\.cpp: .*(is not installed|no such file)"):
        check_peers(PeerRequest(("llama.cpp",), True, tmp_path / "no.gguf"), folder)
    with pytest.raises(DecodingError, match="all already has every peer"):
        PeerRequest.parse("all,transformers")
    with pytest.raises(DecodingError, match=r"only llama\.cpp uses it"):
        PeerRequest.parse("transformers", tmp_path / "no.gguf")
    everything = PeerRequest.parse("all")
    assert everything.names == PEERS
    check_peers(everything, tmp_path)
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a tale"}\n')
    settings = BenchSettings(("autoregressive",), max_new_tokens=4, repeats=1)
    result = bench_model(str(folder), file, settings, dtype="fp32", threads=1, peers=everything)
    assert list(result.report["peers"]) == ["transformers", "prompt_lookup"]
    assert [note.partition(":")[0] for note in result.notes] == ["peer llama.cpp left out"]


def test_a_peer_that_cannot_be_loaded_is_left_out(folder: Path, tmp_path: Path) -> None:
    """Prevents `--peers all` from failing because of an installed program that cannot load the model."""
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    found = open_peers(PeerRequest.parse("all"), broken, "fp32", 1, 8)
    assert found.peers == []
    assert [note.partition(" left out")[0] for note in found.notes if "cannot be loaded" in note] == [
        "peer transformers",
        "peer prompt_lookup",
    ]
    with pytest.raises(DecodingError, match="peer transformers: cannot be loaded"):
        open_peers(PeerRequest.parse("transformers"), broken, "fp32", 1, 8)


def test_an_installation_that_cannot_be_imported_is_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents `--peers all` from failing because llama-cpp-python does not find its shared library."""
    (tmp_path / "llama_cpp.py").write_text("raise OSError('libllama.so: cannot open shared object file')\n")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    found = open_peers(PeerRequest.parse("all", tmp_path / "a.gguf"), folder, "fp32", 1, 8)
    assert [one.name for one in found.peers] == ["transformers", "prompt_lookup"]
    (note,) = found.notes
    assert note.startswith("peer llama.cpp left out: cannot be loaded (libllama.so: cannot open")
    with pytest.raises(DecodingError, match=r"peer llama\.cpp: cannot be loaded \(libllama"):
        open_peers(PeerRequest.parse("llama.cpp", tmp_path / "a.gguf"), folder, "fp32", 1, 8)


def test_peers_end_where_the_context_ends(folder: Path, tmp_path: Path) -> None:
    """Prevents a peer that writes beyond the positions of the model, and a text that so differs from ours."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a tale"}\n')
    settings = BenchSettings(("autoregressive",), max_new_tokens=500, repeats=1)
    request = PeerRequest.parse("transformers")
    report = bench_model(str(folder), file, settings, dtype="fp32", threads=1, peers=request).report
    own, peer = report["modes"]["autoregressive"], report["peers"]["transformers"]
    assert own["new_tokens"] == peer["new_tokens"] < 500 and peer["identical_to_autoregressive"]


def test_prompts_are_rendered_as_they_are_meant(tmp_path: Path) -> None:
    """Prevents a chat model from being measured on questions without its chat template, and texts to continue with one."""
    Tokenizer.train(TEXTS, 300).save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
    )
    shipped = read_bench_prompts(None, tokenizer)
    assert len(shipped) == 60
    for prompt, record in zip(shipped, held_out_prompts(), strict=True):
        text = record["prompt"] if record.get("raw") else f"<user>{record['prompt']}<answer>"
        assert tokenizer.decode(prompt.ids) == text and prompt.kind == record["kind"]
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "kind": "x"}\n{"prompt": "b", "kind": "y"}\n{"prompt": "c", "kind": "x"}\n')
    assert [tokenizer.decode(one.ids) for one in read_bench_prompts(file, tokenizer)] == ["a", "b", "c"]
    two = read_bench_prompts(file, tokenizer, template=True, per_kind=1)
    assert [tokenizer.decode(one.ids) for one in two] == ["<user>a<answer>", "<user>b<answer>"]
    assert len(read_bench_prompts(HELD_OUT, tokenizer, per_kind=6)) == 24
    (tmp_path / "chat_template.jinja").unlink()
    assert read_bench_prompts(None, tokenizer)[0].ids == tokenizer.encode(held_out_prompts()[0]["prompt"])
    with pytest.raises(DataError, match="no chat template"):
        read_bench_prompts(file, tokenizer, template=True)


def test_a_length_that_is_no_number_is_no_speed() -> None:
    """Prevents a division by zero for a kind of which every text ended with its first token."""
    model = random_model(6, 1)
    first = Decoder(model).generate(PROMPTS[1].ids, max_new_tokens=1).token_ids
    decoder = Decoder(model, first)
    report = run_bench(decoder, PROMPTS, BenchSettings(repeats=1, max_new_tokens=8), model="m", dtype="fp32").report
    assert math.isfinite(report["modes"]["verified"]["speedup"]) and torch.get_num_threads() == report["threads"]
