"""Entry point: perplexity and acceptance of a model. `python -m recycle_ds.evaluate --model DIR --data FILE`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from recycle_ds.config.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="Run folder or checkpoint.")],
    data: Annotated[
        str, typer.Option(help="Text, json, jsonl or parquet file, a folder of them, or a dataset's name.")
    ],
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave out and count rows and files that cannot be used.")
    ] = False,
    seq_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a sequence; that of training if not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences evaluated at once.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, max=sys.maxsize, help="Documents evaluated at most.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the perplexity of a model's backbone on a text, and the losses and acceptance of its recycle module."""
    from itertools import chain, islice

    from recycle_ds.checkpoint.portable.folders import check_model_folder
    from recycle_ds.config import ConfigError
    from recycle_ds.data.reading.report import ReadingOptions, ReadReport
    from recycle_ds.data.sources import read_documents

    if dtype not in ("fp32", "bf16"):
        raise ConfigError(f"--dtype {dtype}: must be fp32 or bf16")
    # before torch, which takes seconds to import
    check_model_folder(model)
    report = ReadReport()
    options = ReadingOptions(skip_invalid)
    texts = islice(read_documents(data, text_column, split=split, options=options, report=report), limit)
    first = list(islice(texts, 1))
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()  # before what warns on import
    from recycle_ds.checkpoint.loading import load_model
    from recycle_ds.evaluation.perplexity import evaluate_documents

    loaded = load_model(model, dtype)
    length = seq_length or loaded.seq_length
    if length > loaded.model.max_positions:
        raise ConfigError(f"--seq-length {length}: the model's longest context is {loaded.model.max_positions} tokens")
    # blank documents are left out, as from training data
    documents = (loaded.tokenizer.encode(text, parse_special=False) for text in chain(first, texts) if text.strip())
    result = evaluate_documents(loaded.model, documents, loaded.tokenizer.eos_id, length, batch_size)
    for line in report.lines(read=False):
        print(line, file=sys.stderr)
    if as_json:
        record = {"model": str(loaded.path), "data": data, "tokens": result.tokens, "loss": result.loss}
        record |= {
            "perplexity": result.perplexity,
            "recycle_loss": result.recycle_loss,
            "acceptance": result.acceptance,
            "tokens_per_full_call": result.tokens_per_full_call,
        }
        print(json.dumps(record))
        return
    print(f"{result.tokens:,} tokens of {data}, sequences of {length}")
    print(f"backbone: loss {result.loss:.4f}, perplexity {result.perplexity:.2f}")
    for depth, (loss, share) in enumerate(zip(result.recycle_loss, result.acceptance, strict=True), start=1):
        shown = "no token to predict" if loss is None else f"loss {loss:.4f}"
        judged = "no draft to judge" if share is None else f"acceptance {100 * share:.1f}%"
        print(f"recycle depth {depth}: {shown}, {judged}")
    if result.tokens_per_full_call is not None:
        drafts = "1 draft" if len(result.acceptance) == 1 else f"{len(result.acceptance)} drafts"
        print(f"tokens per full call, {drafts} in a chain: {result.tokens_per_full_call:.2f}")


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, or the process's own arguments."""
    run_command(app, argv)


if __name__ == "__main__":
    main()
