"""Entry point: continues a prompt. `python -m recycle_ds.generate --model DIR --prompt TEXT --mode verified`.

stdout holds the continuation and nothing else (with --json one object); figures, logs and errors go to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from recycle_ds.config import RecycleError
from recycle_ds.config.command import INTERRUPTED, run_command
from recycle_ds.parallel.job import errors_of_host

# Exit code of a program that SIGPIPE ended: the reader of stdout, `head` perhaps, has closed it.
_BROKEN_PIPE = 141

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def generate(
    model: Annotated[str, typer.Option(metavar="DIR", help="Run folder or checkpoint.")],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to continue, raw; - reads stdin.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with the text to continue, raw.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Many prompts: a jsonl file of objects with a `prompt`, split over processes."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="With --prompts: jsonl file to make, a line for every prompt, in order."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="autoregressive, alternate (the paper) or verified (lossless).")
    ] = "verified",
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens to add.")] = 128,
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Recycled tokens per full call; by default 1 in alternate, adaptive in verified."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Arithmetic: fp32, bf16, or int8 (bf16 with weights of 8 bits).")] = "fp32",
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; above 0 samples.")] = 0.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Sample from the K most likely tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample from the likeliest tokens that reach P together.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(metavar="P", help="Drop tokens below P times the likeliest one's chance.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 disfavours tokens already in the text.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted from the logits of tokens in the output.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time that a token occurs.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID:NUMBER", help="Added to the logit of a token; repeatable.")
    ] = None,
    allowed_token: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="Choose no other tokens than these; repeatable.")
    ] = None,
    bad_token: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="Never choose this token; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")] = None,
    stop_token: Annotated[list[int] | None, typer.Option(metavar="ID", help="End at this token; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on after the model's end of sequence.")] = False,
    min_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="No end, and no stop string, within so many new tokens.")
    ] = 0,
    logprobs: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --json: log probabilities of tokens and of the N most likely ones."),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", "--answers", metavar="N", help="With --prompts: answers to each prompt.")
    ] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: text, token_ids and figures.")
    ] = False,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads; by default PyTorch's choice.")] = None,
    max_batch: Annotated[int, typer.Option(metavar="N", help="With --prompts: prompts decoded at once.")] = 16,
    kv_memory_gib: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Memory of the KV cache; by default at most half of what is free."),
    ] = None,
    tensor: Annotated[int, typer.Option(metavar="N", min=1, help="Tensor ranks that hold one model together.")] = 1,
    pipeline: Annotated[int, typer.Option(metavar="N", min=1, help="Pipeline stages of one model.")] = 1,
    explain: Annotated[bool, typer.Option("--explain", help="Print how many drafts are made, and why.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Continue a prompt with a RecycleGPT, recycling the model's own states."""
    from recycle_ds.checkpoint.portable.folders import check_model_folder
    from recycle_ds.inference.batch.prompts import read_lines
    from recycle_ds.inference.errors import DecodingError
    from recycle_ds.inference.parameters import SamplingParams, check_batch, check_logprobs, check_mode, check_runtime

    # what can be checked without torch, which takes seconds to import, is checked first
    many = _many(prompts, output, prompt, prompt_file)
    check_mode(mode)
    check_logprobs(mode, logprobs)
    check_runtime(dtype, threads)
    check_batch(max_batch, kv_memory_gib)
    if mode == "autoregressive" and draft_tokens:
        raise DecodingError(f"--draft-tokens {draft_tokens}: --mode autoregressive makes no drafts; leave it out")
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=_biases(logit_bias or ()),
        allowed_tokens=tuple(allowed_token) if allowed_token else None,
        bad_tokens=tuple(bad_token or ()),
        seed=seed,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        stop=tuple(stop or ()),
        stop_tokens=tuple(stop_token or ()),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        n=n,
        draft_tokens=draft_tokens,
    )
    if many is None or not (many[1].exists() or many[1].with_name(f"{many[1].name}.parts").exists()):
        with errors_of_host():  # a file that is finished, or parts of one, may do without it
            check_model_folder(model)
    if many is not None:
        with errors_of_host():  # the job reads it again; an error is worth more now than after the model was loaded
            read_lines(many[0])
    text = "" if many else _read_prompt(prompt, prompt_file)
    if many is None:
        _check_one_prompt(n, tensor * pipeline)
        if logprobs is not None and not as_json:
            raise DecodingError(f"--logprobs {logprobs}: needs --json, which prints them")
    from recycle_ds.parallel.rendezvous import detect_launch, quiet_libraries

    quiet_libraries()  # before anything is imported that warns
    from recycle_ds.inference.batch.job import BatchSettings, run_batch
    from recycle_ds.inference.console import private_stdout
    from recycle_ds.inference.ranks import join, lost_ranks_end_the_job
    from recycle_ds.inference.request import Request

    interrupted = False
    try:
        with private_stdout() as out, lost_ranks_end_the_job():
            request = Request(model, text, mode, dtype, params, threads)
            ranks = join(detect_launch(os.environ), tensor, pipeline)
            try:
                if many is not None:
                    run_batch(request, BatchSettings(*many, max_batch, kv_memory_gib, explain), ranks)
                else:
                    interrupted = request.run(out, as_json, ranks, kv_memory_gib, explain)
            except (SystemExit, RecycleError):  # planned; after anything else the others must take this rank for lost
                ranks.leave()
                raise
            if not interrupted:
                ranks.leave()
    except BrokenPipeError:
        sys.exit(_BROKEN_PIPE)
    if interrupted:
        sys.exit(INTERRUPTED)


def _biases(texts: Sequence[str]) -> tuple[tuple[int, float], ...]:
    """The pairs of --logit-bias ID:NUMBER. Raises DecodingError for anything else."""
    from recycle_ds.inference.errors import DecodingError

    pairs = []
    for text in texts:
        token, _, value = text.partition(":")
        try:
            pairs.append((int(token), float(value)))
        except ValueError:
            raise DecodingError(f"--logit-bias {text!r}: must be a token id and a number, such as 42:-1.5") from None
    return tuple(pairs)


def _many(
    prompts: str | None, output: str | None, prompt: str | None, prompt_file: str | None
) -> tuple[Path, Path] | None:
    """The files of a request for many prompts, None for a single prompt. Raises DecodingError if only one is given."""
    from recycle_ds.inference.batch.failures import check_name
    from recycle_ds.inference.errors import DecodingError

    if prompts is None and output is None:
        return None
    if prompts is None or output is None or prompt is not None or prompt_file is not None:
        raise DecodingError("--prompts FILE and --output FILE go together, and without --prompt and --prompt-file")
    if prompts == "-":
        raise DecodingError("--prompts -: prompts are read at every start and by every rank: write them to a file")
    check_name(Path(output))
    return Path(prompts), Path(output)


def _check_one_prompt(n: int, team: int) -> None:
    """Raises DecodingError for options of many prompts, and for more ranks than one model is split over."""
    from recycle_ds.inference.errors import DecodingError
    from recycle_ds.parallel.rendezvous import detect_launch

    if n > 1:
        raise DecodingError(f"--n {n}: several answers need --prompts FILE and --output FILE, which hold them all")
    ranks = detect_launch(os.environ).world_size
    if ranks != team:
        raise DecodingError(
            f"{ranks} rank{'s' * (ranks > 1)} for one prompt, but --tensor x --pipeline = {team}: "
            + (
                f"start {team} (torchrun --nproc-per-node {team} -m recycle_ds.generate ...)"
                if ranks < team
                else f"start {team}, raise the degrees, or decode a file of prompts (--prompts)"
            )
        )


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The text to continue, exactly as given. Raises DecodingError."""
    from recycle_ds.inference.errors import DecodingError

    if (prompt is None) == (prompt_file is None):
        raise DecodingError("give the prompt once: --prompt TEXT, --prompt - to read stdin, or --prompt-file FILE")
    try:
        if prompt_file is not None:
            text = Path(prompt_file).read_bytes().decode("utf-8")
        elif prompt == "-":
            text = sys.stdin.buffer.read().decode("utf-8")
        else:
            assert prompt is not None
            prompt.encode("utf-8")  # bytes of the command line that are not UTF-8 arrive as lone surrogates
            text = prompt
    except OSError as error:
        raise DecodingError(f"prompt file {prompt_file!r} cannot be read: {error.strerror}") from None
    except UnicodeError:
        raise DecodingError("the prompt is not valid UTF-8: convert it first (iconv -t utf-8)") from None
    if not text:
        raise DecodingError("the prompt is empty: give at least one character")
    return text


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, by default the process's own arguments.

    If all ranks have the same error, the first one prints it; each writes it for the shell of a batch job, which then
    does not requeue the job."""
    from recycle_ds.parallel.job import is_error_reporter, job_of

    run_command(app, argv, print_error=is_error_reporter(os.environ), on_error=job_of(os.environ).fail)


if __name__ == "__main__":
    main()
