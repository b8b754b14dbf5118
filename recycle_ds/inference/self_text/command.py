"""The command tools/self_generate.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from recycle_ds.config import RecycleError
from recycle_ds.config.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def self_generate(
    model: Annotated[str, typer.Option(metavar="DIR", help="Run folder, checkpoint or model folder.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for train.*, validation.* and self_text.json.")],
    tokens: Annotated[int, typer.Option(metavar="N", help="Least number of tokens to train on.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="jsonl file of objects with a prompt or messages, or txt file of prompts; by default all prompts "
            "are the model's own.",
        ),
    ] = None,
    temperatures: Annotated[
        str, typer.Option(help="Of answers, comma-separated, used in turn; one listed twice is used twice as often.")
    ] = "0,0.6,1.0",
    free: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of rows that begin with a prompt of the model's own.")
    ] = 0.25,
    prompt_temperature: Annotated[float, typer.Option(help="Of what the model writes in a user's place.")] = 1.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Sample from the K most likely tokens; 0: from all.")] = 64,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample from the likeliest tokens that reach P together.")
    ] = 1.0,
    row_tokens: Annotated[int, typer.Option(metavar="N", help="Maximum length of a row (a document).")] = 640,
    turns: Annotated[int, typer.Option(metavar="N", help="Maximum number of answers in a row.")] = 8,
    ngram: Annotated[int, typer.Option(metavar="N", help="Length of the n-grams by which loops are found.")] = 16,
    repeats: Annotated[
        int, typer.Option(metavar="N", help="A row ends where an n-gram occurs more than N times; 0 cuts nothing.")
    ] = 2,
    min_tokens: Annotated[
        int, typer.Option(metavar="N", help="Leave out rows with fewer tokens of the model's own.")
    ] = 32,
    held_out: Annotated[
        str,
        typer.Option(
            metavar="N",
            help="Greedy rows to evaluate on, from prompts of their own: a number, or a share of --tokens, in full rows.",
        ),
    ] = "0",
    exclude: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Texts that no prompt may contain (questions of a benchmark); repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws prompts and tokens.")] = 0,
    mode: Annotated[str, typer.Option(help="autoregressive or verified.")] = "autoregressive",
    dtype: Annotated[str, typer.Option(help="Arithmetic: fp32 or bf16.")] = "bf16",
    max_batch: Annotated[int, typer.Option(metavar="N", help="Rows written at once.")] = 32,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads; by default PyTorch's choice.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Ignore the model's chat template.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Write the rows as readable jsonl files too.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Let a model write text, to train a recycle module on: token files for the `data` section of a run."""
    from recycle_ds.checkpoint.portable.folders import check_model_folder
    from recycle_ds.inference.parameters import TokenSampling, check_runtime
    from recycle_ds.inference.self_text.settings import SelfTextSettings, parse_held_out, parse_temperatures
    from recycle_ds.parallel.job import errors_of_host

    # what can be checked without torch, which takes seconds to import, is checked first
    TokenSampling(top_k=top_k, top_p=top_p, seed=seed)
    check_runtime(dtype, threads)
    settings = SelfTextSettings(
        tokens=tokens,
        temperatures=parse_temperatures(temperatures),
        prompt_temperature=prompt_temperature,
        top_k=top_k,
        top_p=top_p,
        free=free if prompts is not None else 1.0,
        row_tokens=row_tokens,
        turns=turns,
        ngram=ngram,
        repeats=repeats,
        min_tokens=min_tokens,
        held_out=parse_held_out(held_out, tokens, row_tokens),
        seed=seed,
        mode=mode,
        dtype=dtype,
        max_batch=max_batch,
        raw=raw,
    )
    with errors_of_host():
        check_model_folder(model)
        request = _request(model, settings, prompts, tuple(exclude or ()), output, threads, text)
    from recycle_ds.parallel.rendezvous import detect_launch, quiet_libraries

    quiet_libraries()  # before anything is imported that warns
    from recycle_ds.inference.ranks import join
    from recycle_ds.inference.self_text.job import SelfText, run_self_text

    ranks = join(detect_launch(os.environ), 1, 1)
    try:
        manifest = run_self_text(SelfText(**request), ranks)
    except (SystemExit, RecycleError):
        ranks.leave()
        raise
    ranks.leave()
    if manifest is not None:
        _print(manifest, output)


def _request(
    model: str,
    settings: Any,
    prompts: Path | None,
    exclude: tuple[Path, ...],
    output: Path,
    threads: int | None,
    text: bool,
) -> dict[str, Any]:
    """The fields of a `SelfText`, whose module imports torch. Raises DecodingError for files that cannot be used."""
    from recycle_ds.inference.self_text.exclusion import Exclusion, read_texts
    from recycle_ds.inference.self_text.output import OutputFolder
    from recycle_ds.inference.self_text.prompts import PromptSet, read_prompts, select

    exclusion = Exclusion(text for path in exclude for text in read_texts(path))
    held_out = settings.held_out - settings.free_before(settings.held_out)
    found = PromptSet() if prompts is None else select(read_prompts(prompts), exclusion, held_out, settings.seed)
    return {
        "model": model,
        "settings": settings,
        "prompts": found,
        "exclusion": exclusion,
        "prompt_file": prompts,
        "exclude_files": exclude,
        "output": OutputFolder(output, text),
        "threads": threads,
    }


def _print(manifest: dict[str, Any], output: Path) -> None:
    """The table of a complete text."""
    from rich.table import Table

    from recycle_ds.config.console import output_console

    table = Table(
        "files",
        "rows",
        "tokens",
        "by the model",
        "rows cut",
        "8-grams repeated",
        "after the cut",
        title=manifest["model"],
    )
    for side in ("train", "validation"):
        if side in manifest:
            found = manifest[side]
            shares = (
                found["share_of_rows_cut"],
                found["share_repeating_an_8gram_before_cut"],
                found["share_repeating_an_8gram"],
            )
            counts = (found["rows"], found["tokens"], found["tokens_written_by_the_model"])
            table.add_row(
                f"{output / side}.bin .idx .json", *(f"{one:,}" for one in counts), *(f"{one:.1%}" for one in shares)
            )
    output_console().print(table)
    exclude = manifest["exclude"]
    if exclude["texts"]:
        print(
            f"excluded texts: {exclude['texts']}; left out for them: {exclude['prompts']} prompts, {exclude['rows']} rows"
        )
    asked = manifest["settings"]["held_out"]
    if asked and manifest["validation"]["rows"] < asked:
        left = ", ".join(f"{number} {end}" for end, number in manifest["validation"]["rows_left_out"].items())
        print(f"warning: only {manifest['validation']['rows']} of {asked} held-out rows remain; left out: {left}")
    if manifest["train"]["tokens"] < manifest["settings"]["tokens"]:
        print(f"the prompts gave only {manifest['train']['tokens']:,} tokens of {manifest['settings']['tokens']:,}")


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, by default the process's own arguments."""
    from recycle_ds.parallel.job import is_error_reporter, job_of

    run_command(app, argv, print_error=is_error_reporter(os.environ), on_error=job_of(os.environ).fail)


if __name__ == "__main__":
    main()
