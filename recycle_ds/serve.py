"""Entry point: an OpenAI-compatible HTTP server. `python -m recycle_ds.serve --model DIR`.

Prints one line with its address to stderr, then logs. SIGTERM or Ctrl-C drains it: accepted requests are completed, then it
exits with code 0.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from recycle_ds.config.command import run_command
from recycle_ds.parallel.job import errors_of_host, is_error_reporter, job_of
from recycle_ds.serving.settings import MOST_PROMPTS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def serve(
    model: Annotated[str, typer.Option(metavar="DIR", help="Run folder or checkpoint.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is for programs of this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="Port; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model for clients; by default the folder's.")
    ] = None,
    api_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Valid API keys, one a line; without it no key is needed.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A further name of this server, for clients behind a proxy; repeatable."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="Mode of requests that name none: autoregressive, alternate or verified (lossless).")
    ] = "verified",
    dtype: Annotated[str, typer.Option(help="Arithmetic: fp32, bf16, or int8 (bf16 with weights of 8 bits).")] = "fp32",
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads; by default PyTorch's choice.")] = None,
    max_batch: Annotated[int, typer.Option(metavar="N", help="Answers decoded at once.")] = 32,
    kv_memory_gib: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Memory of the KV cache; by default at most half of what is free."),
    ] = None,
    tensor: Annotated[int, typer.Option(metavar="N", min=1, help="Tensor ranks that hold one model together.")] = 1,
    pipeline: Annotated[int, typer.Option(metavar="N", min=1, help="Pipeline stages of one model.")] = 1,
    max_queued: Annotated[
        int, typer.Option(metavar="N", min=0, help="Answers that may wait; further requests get 429.")
    ] = 256,
    max_requests: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests that are answered at once; further ones get 429.")
    ] = 256,
    max_connections: Annotated[
        int, typer.Option(metavar="N", min=1, help="Open connections; further ones get 503.")
    ] = 512,
    max_priority: Annotated[
        int, typer.Option(metavar="N", min=0, max=1000, help="How far a request may raise itself above others.")
    ] = 0,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Most tokens of a prompt; by default the model's context.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Most new tokens of an answer; by default the context.")
    ] = None,
    max_n: Annotated[int, typer.Option(metavar="N", min=1, help="Most answers to one prompt.")] = 16,
    max_prompts: Annotated[
        int, typer.Option(metavar="N", min=1, max=MOST_PROMPTS, help="Most prompts of one request.")
    ] = 64,
    max_body_mib: Annotated[float, typer.Option(metavar="MIB", min=0, help="Largest body of a request.")] = 4.0,
    request_seconds: Annotated[
        float, typer.Option(metavar="S", min=0, help="Time for a complete answer, waiting included.")
    ] = 600.0,
    body_seconds: Annotated[
        float, typer.Option(metavar="S", min=0, help="Time for a client to send its request.")
    ] = 30.0,
    write_seconds: Annotated[
        float, typer.Option(metavar="S", min=0, help="Time for a client to read what it is sent.")
    ] = 60.0,
    drain_seconds: Annotated[
        float, typer.Option(metavar="S", min=0, help="Time for accepted requests after SIGTERM or Ctrl-C.")
    ] = 30.0,
    restart_after_drain: Annotated[
        bool, typer.Option("--restart-after-drain", help="Under SLURM: requeue the job that was drained at its end.")
    ] = False,
    log_level: Annotated[str, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")] = "info",
    log_requests: Annotated[
        bool, typer.Option("--log-requests/--no-log-requests", help="A line for every request, without its texts.")
    ] = True,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Serve a RecycleGPT over HTTP, with OpenAI's API."""
    from recycle_ds.checkpoint.portable.folders import check_model_folder
    from recycle_ds.inference.parameters import check_batch, check_mode, check_runtime
    from recycle_ds.serving.access import read_keys
    from recycle_ds.serving.process.listening import announcement, listen
    from recycle_ds.serving.process.logs import check_level, log_to_stderr
    from recycle_ds.serving.settings import ServerSettings

    # what can be checked without torch, which takes seconds to import, is checked first
    check_mode(mode)
    check_runtime(dtype, threads)
    check_batch(max_batch, kv_memory_gib)
    check_level(log_level)
    settings = ServerSettings(
        model_name=served_model_name or Path(model).resolve().name,
        default_mode=mode,
        run_folder=Path(model) if (Path(model) / "metrics.jsonl").exists() else None,
        host=host,
        allowed_hosts=tuple(allowed_host or ()),
        api_keys=read_keys(Path(api_key_file)) if api_key_file is not None else (),
        max_body_bytes=int(max_body_mib * 2**20),
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        max_n=max_n,
        max_prompts=max_prompts,
        max_requests=max_requests,
        max_connections=max_connections,
        max_priority=max_priority,
        request_seconds=request_seconds,
        body_seconds=body_seconds,
        write_seconds=write_seconds,
        access_log=log_requests,
    )
    with errors_of_host():
        check_model_folder(model)
    listener = listen(host, port) if is_error_reporter(os.environ) else None  # rank 0
    from recycle_ds.parallel.rendezvous import detect_launch, quiet_libraries

    launch, job = detect_launch(os.environ), job_of(os.environ)
    _check_ranks(launch.world_size, tensor * pipeline)
    if launch.rank == 0 and listener is None:  # a launcher's variable that is left over from a shell
        listener = listen(host, port)
    if listener is not None:
        print(announcement(model, listener, in_job=job.folder is not None), file=sys.stderr, flush=True)
    quiet_libraries()  # before anything is imported that warns
    log_to_stderr(log_level)
    from recycle_ds.serving.app import create_app
    from recycle_ds.serving.process.engine_thread import ModelSettings
    from recycle_ds.serving.process.rank import Shutdown, run_rank

    run_rank(
        ModelSettings(model, dtype, threads, tensor, pipeline, max_batch, kv_memory_gib, max_queued),
        launch,
        listener,
        partial(create_app, settings=settings),
        Shutdown(drain_seconds, restart_after_drain),
        job,
    )


def _check_ranks(ranks: int, team: int) -> None:
    """Raises ServingError unless all ranks hold one model together: only one of them can serve HTTP on a port."""
    from recycle_ds.serving.process.errors import ServingError

    if ranks != team:
        count = "1 rank" if ranks == 1 else f"{ranks} ranks"
        raise ServingError(
            f"{count}, but --tensor x --pipeline = {team}: start {team} with torchrun, deepspeed, srun or mpirun, or change "
            "the degrees"
        )


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, by default the process's own arguments."""
    run_command(app, argv, print_error=is_error_reporter(os.environ), on_error=job_of(os.environ).fail)


if __name__ == "__main__":
    main()
