"""The speed of decoding: one stream beside transformers, and many sequences at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from recycle_ds.gpu_check.random_model import random_model
from recycle_ds.inference.batch.prompts import read_prompt_file
from recycle_ds.inference.bench.comparison import BenchSettings, bench_model
from recycle_ds.inference.bench.held_out import HELD_OUT
from recycle_ds.inference.bench.peers import TRANSFORMERS, PeerRequest
from recycle_ds.inference.bench.serving import ServingSettings, measure
from recycle_ds.inference.loading import engine_of, load
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.model.flops import parameters

Write = Callable[[dict[str, Any]], None]

BATCHES = (1, 4, 16, 64)
_PROMPTS, _ROUNDS = 4, 5


def decoding(write: Write, small: bool, model: Path | None, work: Path) -> None:
    """Autoregressive, verified and transformers' `generate` on one stream, interleaved, in bf16 (fp32 if small).

    work: where random weights are kept, if there is no model."""
    folder = _folder(model, small, work)
    dtype = "fp32" if small else "bf16"
    loaded = load(str(folder), dtype, None)
    backbone = loaded.model.recycle_config.model_copy(update={"layers": 0, "taps": ()})
    write({"random_weights": model is None, "weight_bytes": 2 * parameters(loaded.model.config, backbone)})
    del loaded
    settings = BenchSettings(("autoregressive", "verified"), max_new_tokens=6 if small else 64, repeats=2, details=True)
    peers = PeerRequest.parse(TRANSFORMERS)
    template = False if model is None else None  # its tokenizer has no template
    result = bench_model(
        str(folder), None, settings, dtype=dtype, threads=None, template=template, per_kind=1, peers=peers
    )
    write(result.report)  # the next part may run out of time
    write(result.report | {"looking_ahead": _looking_ahead(folder, dtype, tokens=6 if small else 64)})


def serving(write: Write, small: bool, model: Path | None, work: Path) -> None:
    """Tokens per second by batch, autoregressive and verified; each batch is written once measured. work: see `decoding`."""
    sizes = (1, 2) if small else BATCHES
    loaded = load(str(_folder(model, small, work)), "fp32" if small else "bf16", None)
    texts = [str(record["prompt"]) for record in read_prompt_file(HELD_OUT)[:: 60 // _PROMPTS]]
    prompts = [loaded.tokenizer.encode(text)[:128] for text in texts]
    engine = engine_of(loaded, max(sizes), None)
    params = SamplingParams(max_new_tokens=4 if small else 48, temperature=0.0, ignore_eos=True)
    found: dict[str, Any] = {}
    for size in sizes:
        found |= measure(engine, prompts, ServingSettings((size,), params=params, repeats=2))
        write({"random_weights": model is None, "batches": found})


def _looking_ahead(folder: Path, dtype: str, tokens: int) -> dict[str, float]:
    """Tokens per second of one autoregressive stream, with the next step started while this one is computed and without,
    in turn."""
    loaded = load(str(folder), dtype, None)
    engine = engine_of(loaded, 1, None)
    prompt = list(range(1, 33))
    params = SamplingParams(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(1 + _ROUNDS):
        for ahead, speeds in found.items():
            engine.looks_ahead = ahead
            (one,) = engine.add(prompt, params, "autoregressive")
            engine.finish([one])
            answer = one.generation(0.0)
            speeds.append((len(answer.token_ids) - 1) / answer.decode_seconds)
    with_it, without = (median(found[ahead][1:]) for ahead in (True, False))  # the first round captures graphs
    return {"tokens_per_second": with_it, "without": without, "speedup": with_it / without}


def _folder(model: Path | None, small: bool, work: Path) -> Path:
    """The model's folder; without one, random weights in a folder that both benches share."""
    if model is not None:
        return model
    return random_model(work / ("random-small" if small else "random-135m"), small=small)
