"""lm-eval against a running server: log-likelihoods and generation on made-up data, as on the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch

from recycle_ds.checkpoint.loading import LoadedModel
from tests.serving.servers import NAME, TEXT, Server

ROWS = [
    {"context": "the cat sat", "choices": [" on the mat", " na\u00efve", "\uc774"], "answer": 0},
    {"context": "caf\u00e9", "choices": [" \U0001f642 the", " the mat", " mat; on"], "answer": 0},
    {"context": "\uace0\uc591\uc774\uac00", "choices": [" \uc549\uc558\ub2e4", " cat", " the the the"], "answer": 0},
    {"context": "on the", "choices": [" cat \U0001f642", " mat;", "."], "answer": 1},
]


def task(folder: Path, name: str, **fields: Any) -> dict[str, Any]:
    """A task on ROWS, in a local file."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder)},
        "test_split": "test",
    }
    return {"task": name, "doc_to_text": "{{context}}", "metadata": {"version": 1}, **data, **fields}


def likelihood(loaded: LoadedModel, context: str, continuation: str) -> tuple[float, bool]:
    """Log probability of a continuation, and whether it is the greedy one, in one pass of the model."""
    whole = loaded.tokenizer.encode(context + continuation)
    start = len(loaded.tokenizer.encode(context))
    with torch.no_grad():
        logits = loaded.model.logits(loaded.model.hidden_states(torch.tensor([whole])))[:, 0]
    rows = logits.log_softmax(-1)[start - 1 : -1]
    score = sum(float(row[token]) for row, token in zip(rows, whole[start:], strict=True))
    return score, rows.argmax(-1).tolist() == whole[start:]


def test_lm_eval_scores_what_the_model_scores(server: Server, loaded: LoadedModel, tmp_path: Path) -> None:
    """Prevents an evaluation through the server that differs from one of the model: other tokens, shifted
    scores, cut answers."""
    from lm_eval.tasks import TaskManager

    choice = task(tmp_path, "choice", output_type="multiple_choice", doc_to_choice="choices", doc_to_target="answer")
    choice |= {"target_delimiter": "", "metric_list": [{"metric": "acc"}]}
    until = task(
        tmp_path, "until", output_type="generate_until", doc_to_target="x", metric_list=[{"metric": "exact_match"}]
    )
    until |= {"generation_kwargs": {"until": [" the"], "max_gen_toks": 8, "temperature": 0.0}}
    options = {"model": NAME, "base_url": f"{server.url}/v1/completions", "tokenizer": str(loaded.path)}
    options |= {"tokenizer_backend": "huggingface", "num_concurrent": 1, "max_retries": 1, "max_length": 120}
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=options | {"add_bos_token": False},
        tasks=[choice, until],
        task_manager=TaskManager(include_defaults=False),  # reading all of its own tasks takes long
        batch_size=3,
        log_samples=True,
        bootstrap_iters=0,
        num_fewshot=0,
    )
    seen = set()
    for sample, row in zip(found["samples"]["choice"], ROWS, strict=True):
        for (score, greedy), text in zip(sample["filtered_resps"], row["choices"], strict=True):  # type: ignore[call-overload]
            expected, is_greedy = likelihood(loaded, str(row["context"]), text)
            assert float(score) == pytest.approx(expected, abs=1e-3)
            assert str(greedy) == str(is_greedy)
            seen.add(is_greedy)
    assert seen == {True, False}
    http = server.http()
    for sample in found["samples"]["until"]:
        body = {"prompt": sample["doc"]["context"], "max_tokens": 8, "temperature": 0, "stop": [" the"]}
        (text,) = sample["filtered_resps"]
        assert text == http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert TEXT.count("the") == 2
