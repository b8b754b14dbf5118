"""Entry point: continues a prompt. `python -m recycle_ds.generate --model DIR --prompt TEXT --mode verified`.

stdout holds the continuation and nothing else (with --json one object); figures, logs and errors go to stderr.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recycle_ds.config.command import INTERRUPTED, run_command, user_errors

if TYPE_CHECKING:
    from recycle_ds.inference.request import Request

# What a shell reports of a program ended by SIGPIPE: the reader of stdout, `head` perhaps, had enough.
_BROKEN_PIPE = 141
# What tells the shell of a batch job that its share is to be gone on with, where it cannot be told otherwise (EX_TEMPFAIL).
_STOPPED_UNHEARD = 75
# Seconds before the end of a job at which no prompt is begun any more, beside what two of them took.
_MARGIN = 10.0

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
    dtype: Annotated[str, typer.Option(help="Arithmetic: fp32 or bf16.")] = "fp32",
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; above 0 samples.")] = 0.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Sample from the K most likely tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample from the likeliest tokens that reach P together.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(metavar="P", help="Drop tokens below P times the likeliest one's chance.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 disfavours tokens already in the text.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: text, token_ids and figures.")
    ] = False,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads; by default PyTorch's choice.")] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Continue a prompt with a RecycleGPT, recycling the model's own states."""
    many = _many(prompts, output, prompt, prompt_file)
    if many is None:
        _check_single_process()
    text = "" if many else _read_prompt(prompt, prompt_file)
    from recycle_ds.inference.console import private_stdout
    from recycle_ds.inference.request import Request
    from recycle_ds.inference.speculation.sampling import SamplingParams

    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    try:
        with private_stdout() as out:
            request = Request(
                model, text, mode, max_new_tokens, draft_tokens, dtype, params, tuple(stop or ()), threads
            )
            if many is not None:
                _run_many(request, *many)
                return
            interrupted = request.run(out, as_json)
    except BrokenPipeError:
        sys.exit(_BROKEN_PIPE)
    if interrupted:
        sys.exit(INTERRUPTED)


def _many(
    prompts: str | None, output: str | None, prompt: str | None, prompt_file: str | None
) -> tuple[Path, Path] | None:
    """The files of a request for many prompts, None for one. Raises DecodingError for half a request."""
    from recycle_ds.inference.errors import DecodingError

    if prompts is None and output is None:
        return None
    if prompts is None or output is None or prompt is not None or prompt_file is not None:
        raise DecodingError("--prompts FILE and --output FILE go together, and without --prompt and --prompt-file")
    return Path(prompts), Path(output)


def _run_many(request: Request, prompts: Path, output: Path) -> None:
    """This process's share of a file of prompts, until all are done or the job must end. Raises RecycleError; what is wrong
    with one of its own prompts is printed here, whichever rank this is."""
    from recycle_ds.inference.batch.prompt_file import PromptError, PromptFile
    from recycle_ds.inference.loading import load
    from recycle_ds.parallel.job import FINISHED, STOPPED, job_of
    from recycle_ds.parallel.rendezvous import detect_launch, own_device, quiet_libraries
    from recycle_ds.training.faults.stop_requests import JOB_SIGNAL, StopRequest

    quiet_libraries()
    launch, job = detect_launch(os.environ), job_of(os.environ)
    index = own_device(launch).index or 0  # refused before a model is loaded onto another rank's
    share = PromptFile(prompts, output, launch.rank, launch.world_size, request.model, request.settings)
    longest = begun = 0.0
    with StopRequest({job.stop_file: JOB_SIGNAL} if job.stop_file else {}, job.end) as stopping:
        # files may be missing, or others, on one host only: one rank of each tells, and the first one always
        with user_errors(speak=launch.rank == 0 or launch.local_rank == 0, tell=job.fail):
            loaded = share.settle(lambda path: load(path, request.dtype, request.threads, index))

        def generate(index: int, text: str) -> dict[str, object]:
            nonlocal longest, begun
            begun = time.monotonic()
            assert loaded is not None
            record = request.record_of_one(loaded, text, index)
            longest = max(longest, time.monotonic() - begun)
            return record

        def progress(done: int, of: int) -> None:
            print(f"rank {launch.rank}: {done} of {of} prompts", file=sys.stderr, flush=True)
            job.tell("progress", f"rank {launch.rank}: {done}")

        try:
            complete = loaded is None or share.work(
                generate, lambda: stopping.poll(_MARGIN + 2 * longest) is not None, progress
            )
        except PromptError:
            with user_errors(tell=job.fail):  # no other rank knows of it
                raise
        if complete:
            job.tell("outcome", FINISHED)
            print(f"{output}: all prompts are done", file=sys.stderr, flush=True)
        elif stopping.reason:
            print(f"rank {launch.rank}: stopped ({stopping.reason}); the same command goes on", file=sys.stderr)
            if not job.tell("outcome", STOPPED):
                sys.exit(_STOPPED_UNHEARD)


def _check_single_process() -> None:
    from recycle_ds.inference.errors import DecodingError
    from recycle_ds.parallel.rendezvous import detect_launch, quiet_libraries

    quiet_libraries()  # before what warns on import
    if detect_launch(os.environ).world_size > 1:
        raise DecodingError(
            "one prompt over several ranks is not available yet: run one process, or split a file of them: --prompts"
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
            prompt.encode("utf-8")  # bytes of the command line that are no UTF-8 arrive as lone surrogates
            text = prompt
    except OSError as error:
        raise DecodingError(f"prompt file {prompt_file!r} cannot be read: {error.strerror}") from None
    except UnicodeError:
        raise DecodingError("the prompt is not valid UTF-8: convert it first (iconv -t utf-8)") from None
    if not text:
        raise DecodingError("the prompt is empty: give at least one character")
    return text


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, or the process's own arguments. Of ranks that share an error the first alone prints it;
    each tells it to the shell of a batch job, since what the user must mend is no reason to start again."""
    from recycle_ds.parallel.job import job_of, speaks

    run_command(app, argv, speak=speaks(os.environ), tell=job_of(os.environ).fail)


if __name__ == "__main__":
    main()
