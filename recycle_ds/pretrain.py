"""Entry point: pretrains a RecycleGPT. `torchrun --nproc-per-node 2 -m recycle_ds.pretrain --config FILE [KEY=VALUE]`."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from recycle_ds.config import (
    ConfigError,
    RunConfig,
    TokenSource,
    load_config,
    load_deepspeed_json,
    resolve_deepspeed,
)
from recycle_ds.config.command import INTERRUPTED, run_command
from recycle_ds.parallel.job import REQUEUE_EXIT_CODE, ShellNotInformed, errors_of_host, is_error_reporter, job_of
from recycle_ds.parallel.peers import PEER_LOST, MachineFault, PeerLost, TakenOver, lost_peer

if TYPE_CHECKING:
    import torch

    from recycle_ds.checkpoint.portable.manifest import DataIdentity
    from recycle_ds.checkpoint.run.lock import RunLock
    from recycle_ds.data.loader import BatchLoader
    from recycle_ds.parallel.job import Job
    from recycle_ds.parallel.mesh import Mesh
    from recycle_ds.training.observers import Observer


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
    # Ctrl-C: what follows in the user's shell must not take the run for finished; a job's shell reads `outcome` instead. Other
    # ranks exit with 0, since the launcher may end the first one, which writes the summary, once another has failed.
    if ended == "SIGINT" and job_of(os.environ).folder is None and is_error_reporter(os.environ):
        raise typer.Exit(INTERRUPTED)


def run(config: RunConfig, *, check: bool = False, observers: Sequence[Observer] = ()) -> str:
    """Sets up ranks, data, engine and state, and trains. Returns why it ended; raises RecycleError for the user's errors.
    check: stops before the data, which need not exist yet, and before the ranks connect. observers: called after those of
    `training.observers`; every rank must be given the same ones."""
    import time

    from recycle_ds.checkpoint.portable.folders import check_run_dir
    from recycle_ds.data.prepare import check_data
    from recycle_ds.training.observers.loading import check_observers

    started = time.time()
    with errors_of_host():  # before torch, which takes seconds to import
        notes: list[str] = []
        load_deepspeed_json(config.deepspeed, notes)
        if is_error_reporter(os.environ):
            for note in notes:
                print(note, flush=True)
        check_run_dir(config.run_dir)
        check_observers(config.training, observers)
        if not check:
            check_data(config.data)

    import torch

    from recycle_ds.parallel import rendezvous
    from recycle_ds.parallel.agree import on_first_rank
    from recycle_ds.parallel.job import Job
    from recycle_ds.parallel.layout import check_node, layout_of
    from recycle_ds.parallel.mesh import build_mesh

    rendezvous.quiet_libraries()
    launch = rendezvous.detect_launch(os.environ)
    check_node(config.parallel, launch.world_size, launch.local_world_size)
    deepspeed_config = resolve_deepspeed(config, layout_of(config.parallel, launch.world_size).data)
    if check:
        return "checked"
    started_here = rendezvous.start(launch)
    try:
        mesh = build_mesh(config.parallel)
        device = rendezvous.own_device(launch)
        torch.manual_seed(config.training.seed * 1_000_003 + mesh.rank)
        job = job_of(os.environ) if mesh.is_first else Job()
        lock = on_first_rank(lambda: _prepare(config, job), mesh, device)
        if config.faults.hang_timeout:  # data are there; the first step may take four times as long as others
            rendezvous.shorten_timeouts(5 * config.faults.hang_timeout + 60)
        try:
            return _train(config, deepspeed_config, mesh, device, job, lock, started, observers)
        except RuntimeError as error:
            lost = lost_peer(error)
            if lost is None:
                raise
            raise lost from None
        finally:
            if lock is not None:
                lock.release()
    finally:
        if started_here:
            rendezvous.stop()


def _prepare(config: RunConfig, job: Job) -> RunLock:
    """On rank 0: prepares missing token files, locks the run folder and removes what an earlier start left unfinished."""
    from recycle_ds.checkpoint.portable.folders import make_run_dir, remove_unfinished
    from recycle_ds.checkpoint.run.lock import RunLock
    from recycle_ds.data.prepare import prepare_if_missing
    from recycle_ds.training.faults.job_end import STOP

    report = prepare_if_missing(config.data, progress=sys.stderr.isatty())
    for line in report.lines(read=False) if report is not None else ():
        print(f"data: {line}", flush=True)
    run_dir = make_run_dir(config.run_dir)
    lock = RunLock(run_dir, job)
    remove_unfinished(run_dir)
    (run_dir / STOP).unlink(missing_ok=True)
    job.write_note("run_dir", str(run_dir.resolve()))
    return lock


@dataclass(frozen=True)
class _Inputs:
    """The data of a run, and its configuration with the vocabulary filled in."""

    config: RunConfig
    identity: DataIdentity
    train: BatchLoader
    validation: BatchLoader | None


def _open(config: RunConfig, mesh: Mesh) -> _Inputs:
    """Opens tokenizer and token files and checks that they belong together."""
    from recycle_ds.checkpoint.portable.manifest import DataIdentity
    from recycle_ds.data.loader import BatchLoader, open_dataset
    from recycle_ds.data.token_files import read_sidecar
    from recycle_ds.data.tokenizer import Tokenizer

    training = config.training
    tokenizer = Tokenizer.load(config.data.tokenizer)
    config = _with_vocabulary(config, tokenizer.vocab_size)

    def loader(sources: tuple[TokenSource, ...]) -> BatchLoader:
        return BatchLoader(
            open_dataset(sources, tokenizer, training.seq_length, training.seed),
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            depth=config.recycle.depth if config.recycle.layers else 0,
            data_rank=mesh.data.rank,
            data_size=mesh.data.size,
        )

    train = loader(config.data.train)
    validation = loader(config.data.validation) if config.data.validation and training.eval_every else None
    sidecars = [read_sidecar(source.path) for source in config.data.train]
    files: list[dict[str, int | str]] = [
        {"tokens": one.tokens, "documents": one.documents, "sha256": one.bin_sha256} for one in sidecars
    ]
    return _Inputs(config, DataIdentity(tokenizer=tokenizer.fingerprint, train=files), train, validation)


def _train(
    config: RunConfig,
    deepspeed_config: dict[str, object],
    mesh: Mesh,
    device: torch.device,
    job: Job,
    lock: RunLock | None,
    started: float,
    given: Sequence[Observer],
) -> str:
    from recycle_ds.checkpoint.run import resume
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

    inputs = on_all_ranks(lambda: _open(config, mesh), mesh, device)
    config = inputs.config
    taken_by: Callable[[], str | None] = lock.taken_by if lock is not None else lambda: None
    with stop_request(config, mesh, job, taken_by) as stop:
        found = resume.checkpoint_to_resume(config, inputs.identity, mesh, device)
        if mesh.is_first:
            for warning in _warnings(config, resumed=found is not None):
                print(f"warning: {warning}", flush=True)
        engine = build_engine(config, dict(deepspeed_config), mesh, device, initial=found is None)
        state, source = resume.begin(config, found, engine, device)
        open_logs = functools.partial(open_run_logs, config, job, state, source, taken_by, started)
        logs = on_first_rank(open_logs, mesh, device) or []
        write_layout_file(config, engine, device)
        ranking = on_first_rank(functools.partial(ranking_of_run, config), mesh, device)
        train_on_drafts(engine, config, ranking, device)
        checkpointer = PortableCheckpointer(config, engine, device, inputs.identity, taken_by, ranking)
        gather = functools.partial(observers_of_run, config, engine, device, stop, logs, given)
        observers = on_all_ranks(gather, mesh, device)
        steps = min(config.training.steps, config.training.stop_at or config.training.steps) - state.step
        end = state.next_sample + steps * config.training.global_batch_size
        with prefetch(inputs.train, device, end) as train:
            trainer = Trainer(config, engine, train, inputs.validation, checkpointer, observers, device)
            try:
                ended = trainer.run(state, stop)
            except LocalError as error:
                if not mesh.is_first:
                    print_local_error(error, mesh)
                raise
        # the user may have created the stop file in the meantime
        conclude(job, (stop.poll(0) or ended) if ended in REASONS else ended)
        stop.remove_stop_files()
        return ended


def _warnings(config: RunConfig, *, resumed: bool) -> list[str]:
    """Settings that have no effect or are probably a mistake, one line each."""
    training, parallel = config.training, config.parallel
    found = []
    if training.warmup_steps > training.steps:
        found.append(f"training.warmup_steps ({training.warmup_steps}) is reduced to training.steps ({training.steps})")
    if parallel.sequence and parallel.tensor == 1:
        found.append("parallel.sequence=true does nothing at parallel.tensor=1")
    if config.recycle.gradient == "frozen_backbone" and config.init_from is None and not resumed:
        found.append(
            "recycle.gradient=frozen_backbone without init_from: the module is trained on a backbone of random weights that "
            "stays as it is; name the folder of a trained model, init_from=FOLDER"
        )
    return found


def _with_vocabulary(config: RunConfig, vocab_size: int) -> RunConfig:
    """Fills in the tokenizer's vocabulary size if the model's is not given. Raises ConfigError if the model's is too
    small."""
    given = config.model.vocab_size
    if given is not None and given < vocab_size:
        raise ConfigError(
            f"model.vocab_size ({given}) is smaller than the tokenizer's vocabulary ({vocab_size}): "
            "raise it, or leave it out"
        )
    model = config.model.model_copy(update={"vocab_size": given or vocab_size})
    return config.model_copy(update={"model": model})


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
