"""Entry point: pretrains a RecycleGPT. `torchrun --nproc-per-node 2 -m recycle_ds.pretrain --config FILE [KEY=VALUE]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from recycle_ds.config import RunConfig, load_config, load_deepspeed_json, resolve_deepspeed
from recycle_ds.config.command import INTERRUPTED, run_command
from recycle_ds.config.setting_warnings import setting_warnings
from recycle_ds.parallel.job import (
    REQUEUE_EXIT_CODE,
    ShellNotInformed,
    errors_of_host,
    is_error_reporter,
    is_to_report_interruption,
    job_of,
    transient_errors_of_host,
)
from recycle_ds.parallel.peers import PEER_LOST, MachineFault, PeerLost, TakenOver, lost_peers_named

if TYPE_CHECKING:
    from recycle_ds.training.observers import Observer
    from recycle_ds.training.run_context import RunContext


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def pretrain(
    config: Annotated[
        str, typer.Option(help="Run configuration: a YAML file, or the name of one in ds_configs/runs/.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that replace the file's.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the settings for these ranks; no data.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Pretrain a RecycleGPT. A run resumes by itself from the newest whole checkpoint in run_dir."""
    from recycle_ds.checkpoint.run.init_from import init_from_defaults

    with errors_of_host():
        settings = load_config(config, overrides or (), init_from_defaults)
    ended = run(settings, check=check)
    if is_to_report_interruption(ended, os.environ):
        raise typer.Exit(INTERRUPTED)


def run(config: RunConfig, *, check: bool = False, observers: Sequence[Observer] = ()) -> str:
    """Sets up ranks, data, engine and state, and trains. Returns why it ended; raises RecycleError for the user's errors.
    check: stops before the data, which need not exist yet, and before the ranks connect. observers: called after those of
    `training.observers`; every rank must be given the same ones."""
    import time

    from recycle_ds.data.prepare import check_data, vocabulary_size

    started = time.time()
    with errors_of_host():  # before torch, which takes seconds to import
        _check(config, observers)
        if not check:
            check_data(config.data)
            with transient_errors_of_host():
                config = config.with_vocabulary(vocabulary_size(config.data))

    import torch

    from recycle_ds.parallel import rendezvous
    from recycle_ds.parallel.layout import check_node, layout_of
    from recycle_ds.parallel.mesh import build_mesh

    rendezvous.quiet_libraries()
    launch = rendezvous.detect_launch(os.environ)
    check_node(config.parallel, launch.world_size, launch.local_world_size)
    deepspeed_config = resolve_deepspeed(config, layout_of(config.parallel, launch.world_size).data)
    if check:
        return "checked"
    from recycle_ds.checkpoint.run.starting import started_run

    started_here = rendezvous.start(launch)
    try:
        mesh = build_mesh(config.parallel, rendezvous.own_device(launch))
        torch.manual_seed(config.training.seed * 1_000_003 + mesh.rank)
        with started_run(config, deepspeed_config, mesh, started) as context, lost_peers_named():
            return _train(context, observers)
    finally:
        if started_here:
            rendezvous.stop()


def _check(config: RunConfig, observers: Sequence[Observer]) -> None:
    """Checks what can be wrong without ranks and data. Raises RecycleError."""
    from recycle_ds.checkpoint.portable.folders import check_run_dir
    from recycle_ds.training.observers.loading import check_observers

    notes: list[str] = []
    load_deepspeed_json(config.deepspeed, notes)
    if is_error_reporter(os.environ):
        for note in notes:
            print(note, flush=True)
    check_run_dir(config.run_dir)
    check_observers(config.training, observers)


def _train(context: RunContext, given: Sequence[Observer]) -> str:
    """Builds what the run consists of, and runs it. Returns why it ended."""
    from recycle_ds.checkpoint.run import resume
    from recycle_ds.checkpoint.run.inputs import open_inputs
    from recycle_ds.checkpoint.run.saving import PortableCheckpointer
    from recycle_ds.data.token_ranking import ranking_of_run
    from recycle_ds.parallel.agree import on_all_ranks, on_first_rank
    from recycle_ds.training.engine.build import build_engine, train_on_drafts
    from recycle_ds.training.errors import LocalError
    from recycle_ds.training.faults.job_end import conclude, print_local_error, stop_request
    from recycle_ds.training.faults.stop_requests import REASONS
    from recycle_ds.training.loop import Trainer
    from recycle_ds.training.prefetching import prefetch
    from recycle_ds.training.reporting.layout_file import write_layout_file
    from recycle_ds.training.reporting.observers_of_run import observers_of_run, open_run_logs

    config, mesh = context.config, context.mesh
    inputs = open_inputs(context)
    with stop_request(context) as stop:
        found = resume.checkpoint_to_resume(context, inputs.identity)
        if mesh.is_first:
            for warning in setting_warnings(config, resumed=found is not None):
                print(f"warning: {warning}", flush=True)
        engine = build_engine(context, initial=found is None)
        state, source = resume.begin(engine, found)
        logs = on_first_rank(lambda: open_run_logs(context, state, source), mesh) or []
        write_layout_file(engine)
        ranking = on_first_rank(lambda: ranking_of_run(config), mesh)
        train_on_drafts(engine, ranking)
        checkpointer = PortableCheckpointer(engine, inputs.identity, ranking)
        observers = on_all_ranks(lambda: observers_of_run(engine, stop, logs, given), mesh)
        steps = min(config.training.steps, config.training.stop_at or config.training.steps) - state.step
        end = state.next_sample + steps * config.training.global_batch_size
        with prefetch(inputs.train, mesh.device, end) as train:
            try:
                ended = Trainer(engine, train, inputs.validation, checkpointer, observers).run(state, stop)
            except LocalError as error:
                if not mesh.is_first:
                    print_local_error(error, mesh)
                raise
        # the user may have created the stop file in the meantime
        conclude(context.job, (stop.poll(0) or ended) if ended in REASONS else ended)
        stop.remove_stop_files()
        return ended


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, by default the process's own arguments.

    If all ranks have the same error, the first one prints it; each writes it for the shell of a batch job, which then
    does not requeue the job."""
    first = is_error_reporter(os.environ)
    try:
        run_command(app, argv, print_error=first, on_error=job_of(os.environ).fail)
    except (PeerLost, MachineFault, TakenOver) as lost:  # not the user's to fix: a batch job is requeued
        if first:
            print(f"error: {lost}", file=sys.stderr, flush=True)
        _leave(PEER_LOST)
    except ShellNotInformed as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
        _leave(REQUEUE_EXIT_CODE)
    except SystemExit as leaving:
        if leaving.code is not None and not isinstance(leaving.code, int):
            print(leaving.code, file=sys.stderr, flush=True)
        _leave(leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None))


def _leave(code: int) -> None:
    """Ends the process; by `exit_process` if ranks were started."""
    if "deepspeed" in sys.modules:
        from recycle_ds.parallel.rendezvous import exit_process

        exit_process(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
