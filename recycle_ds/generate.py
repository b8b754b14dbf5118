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
from recycle_ds.parallel.job import errors_of_host

if TYPE_CHECKING:
    from recycle_ds.inference.request import Request

# Exit code of a program that SIGPIPE ended: the reader of stdout, `head` perhaps, has closed it.
_BROKEN_PIPE = 141
# No prompt is started this many seconds before the end of the job, plus twice the longest time that a prompt took.
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
    from recycle_ds.checkpoint.portable.folders import check_folder
    from recycle_ds.inference.parameters import SamplingParams, check_mode, check_runtime

    # what can be checked without torch, which takes seconds to import, is checked first
    many = _many(prompts, output, prompt, prompt_file)
    check_mode(mode)
    check_runtime(dtype, threads)
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        draft_tokens=draft_tokens,
    )
    if many is None or not (many[1].exists() or many[1].with_name(f"{many[1].name}.parts").exists()):
        with errors_of_host():  # a file that is finished, or parts of one, may do without it
            check_folder(model)
    text = "" if many else _read_prompt(prompt, prompt_file)
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()  # before anything is imported that warns
    if many is None:
        _check_single_process()
    from recycle_ds.inference.console import private_stdout
    from recycle_ds.inference.request import Request

    try:
        with private_stdout() as out:
            request = Request(model, text, mode, dtype, params, threads)
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
    """The files of a request for many prompts, None for a single prompt. Raises DecodingError if only one is given."""
    from recycle_ds.inference.errors import DecodingError

    if prompts is None and output is None:
        return None
    if prompts is None or output is None or prompt is not None or prompt_file is not None:
        raise DecodingError("--prompts FILE and --output FILE go together, and without --prompt and --prompt-file")
    return Path(prompts), Path(output)


def _run_many(request: Request, prompts: Path, output: Path) -> None:
    """Continues this process's share of a file of prompts, until all are done or the job must end.

    Raises RecycleError. An error in a prompt of this process is printed here, on whichever rank.
    """
    from recycle_ds.inference.batch.prompt_file import PromptError, PromptFile
    from recycle_ds.inference.loading import load
    from recycle_ds.parallel.job import FINISHED, REQUEUE_EXIT_CODE, SAVED_FOR_RESTART, job_of
    from recycle_ds.parallel.rendezvous import detect_launch, own_device
    from recycle_ds.training.faults.stop_requests import JOB_SIGNAL, StopRequest

    launch, job = detect_launch(os.environ), job_of(os.environ)
    index = own_device(launch).index or 0  # before a model is loaded onto a device that another rank uses
    share = PromptFile(prompts, output, launch.rank, launch.world_size, request.model, request.settings)
    longest = start = 0.0
    with StopRequest({job.stop_file: JOB_SIGNAL} if job.stop_file else {}, job.end) as stopping:
        with errors_of_host():
            loaded = share.settle(lambda path: load(path, request.dtype, request.threads, index))

        def generate(index: int, text: str) -> dict[str, object]:
            nonlocal longest, start
            start = time.monotonic()
            assert loaded is not None
            record = request.record_of_one(loaded, text, index)
            longest = max(longest, time.monotonic() - start)
            return record

        def progress(done: int, of: int) -> None:
            print(f"rank {launch.rank}: {done} of {of} prompts", file=sys.stderr, flush=True)
            job.write_note("progress", f"rank {launch.rank}: {done}")

        try:
            complete = loaded is None or share.work(
                generate, lambda: stopping.poll(_MARGIN + 2 * longest) is not None, progress
            )
        except PromptError:
            with user_errors(on_error=job.fail):  # the other ranks do not have this error
                raise
        if complete:
            job.write_note("outcome", FINISHED)
            print(f"{output}: all prompts are done", file=sys.stderr, flush=True)
        elif stopping.reason:
            print(f"rank {launch.rank}: stopped ({stopping.reason}); the same command resumes", file=sys.stderr)
            if not job.write_note("outcome", SAVED_FOR_RESTART):
                sys.exit(REQUEUE_EXIT_CODE)


def _check_single_process() -> None:
    from recycle_ds.inference.errors import DecodingError
    from recycle_ds.parallel.rendezvous import detect_launch

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

    If all ranks have the same error, the first one prints it; each writes it for the shell of a batch job, which then does not
    requeue the job.
    """
    from recycle_ds.parallel.job import is_error_reporter, job_of

    run_command(app, argv, print_error=is_error_reporter(os.environ), on_error=job_of(os.environ).fail)


if __name__ == "__main__":
    main()
