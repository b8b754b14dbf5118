"""Entry point: pretrains a RecycleGPT. `deepspeed --num_gpus 2 --module recycle_ds.pretrain --config FILE [key=value ...]`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recycle_ds.config import (
    ConfigError,
    RecycleError,
    RunConfig,
    TokenSource,
    load_config,
    resolve_deepspeed,
)
from recycle_ds.config.command import run_command
from recycle_ds.parallel.job import Unheard
from recycle_ds.parallel.peers import MachineFault, PeerLost, TakenOver, lost_peer

if TYPE_CHECKING:
    import torch

    from recycle_ds.checkpoint.portable.manifest import DataIdentity
    from recycle_ds.checkpoint.run.lock import RunLock
    from recycle_ds.data.loader import BatchLoader
    from recycle_ds.parallel.job import Job
    from recycle_ds.parallel.mesh import Mesh

PEER_LOST = 69
"""Exit code of a rank that waits for one that has gone, or for a file system (EX_UNAVAILABLE)."""
STOPPED_UNHEARD = 75
"""Exit code of a run that saved for its job's sake and could not tell the job's shell (EX_TEMPFAIL)."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def pretrain(
    config: Annotated[str, typer.Option(help="Run configuration (YAML); shipped ones are in ds_configs/runs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that replace the file's.")
    ] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Pretrain a RecycleGPT. A run resumes by itself from the newest whole checkpoint in run_dir."""
    run(load_config(config, overrides or ()))


def run(config: RunConfig) -> str:
    """Sets up ranks, data, engine and state, trains, and says why it ended. Raises RecycleError for what the user can mend."""
    import os

    import torch

    from recycle_ds.parallel import rendezvous
    from recycle_ds.parallel.agree import on_first_rank
    from recycle_ds.parallel.job import Job, job_of
    from recycle_ds.parallel.layout import check_node, layout_of
    from recycle_ds.parallel.mesh import build_mesh

    rendezvous.quiet_libraries()
    launch = rendezvous.detect_launch(os.environ)
    check_node(config.parallel, launch.world_size, launch.local_world_size)
    deepspeed_config = resolve_deepspeed(config, layout_of(config.parallel, launch.world_size).data)
    begun_here = rendezvous.start(launch)
    try:
        mesh = build_mesh(config.parallel)
        place = rendezvous.own_device(launch)
        torch.manual_seed(config.training.seed * 1_000_003 + mesh.rank)
        job = job_of(os.environ) if mesh.is_first else Job()
        lock = on_first_rank(lambda: _prepare(config, job), mesh, place)
        if config.faults.hang_timeout:  # nobody waits for data any more; the first step may take four times as long
            rendezvous.shorten_timeouts(5 * config.faults.hang_timeout + 60)
        try:
            return _train(config, deepspeed_config, mesh, place, job, lock)
        except RuntimeError as error:
            lost = lost_peer(error)
            if lost is None:
                raise
            raise lost from None
        finally:
            if lock is not None:
                lock.release()
    finally:
        if begun_here:
            rendezvous.stop()


def _prepare(config: RunConfig, job: Job) -> RunLock:
    """Rank 0: token files, if they are missing, and a run folder of our own without an earlier run's leftovers."""
    from recycle_ds.checkpoint.portable.folders import remove_unfinished
    from recycle_ds.checkpoint.run.lock import RunLock
    from recycle_ds.data.prepare import prepare_if_missing
    from recycle_ds.training.faults.job_end import STOP

    prepare_if_missing(config.data, progress=sys.stderr.isatty())
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir={config.run_dir!r}: cannot be made ({error.strerror}); name a folder you may write to"
        ) from None
    lock = RunLock(run_dir, job)
    remove_unfinished(run_dir)
    (run_dir / STOP).unlink(missing_ok=True)
    job.tell("run_dir", str(run_dir.resolve()))
    return lock


@dataclass(frozen=True)
class _Inputs:
    """What a run reads."""

    config: RunConfig
    identity: DataIdentity
    train: BatchLoader
    validation: BatchLoader | None


def _open(config: RunConfig, mesh: Mesh) -> _Inputs:
    """Tokenizer and token files, checked against each other; the configuration with the vocabulary filled in."""
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
    place: torch.device,
    job: Job,
    lock: RunLock | None,
) -> str:
    from recycle_ds.checkpoint.run import resume
    from recycle_ds.checkpoint.run.saving import PortableCheckpointer
    from recycle_ds.parallel.agree import on_first_rank, together
    from recycle_ds.training.engine.build import build_engine
    from recycle_ds.training.errors import OwnError
    from recycle_ds.training.faults.job_end import conclude, stop_request, tell_alone
    from recycle_ds.training.faults.stop_requests import REASONS
    from recycle_ds.training.loop import Trainer
    from recycle_ds.training.reporting.layout_file import describe_run
    from recycle_ds.training.reporting.run_logs import Records, begin_records

    inputs = together(lambda: _open(config, mesh), mesh, place)
    config = inputs.config
    if mesh.is_first:
        for warning in _ignored(config):
            print(f"warning: {warning}", flush=True)
    taken_by: Callable[[], str | None] = lock.taken_by if lock is not None else lambda: None
    with stop_request(config, mesh, job, taken_by) as stop:
        found = resume.find_checkpoint(config, inputs.identity, mesh, place)
        engine = build_engine(config, dict(deepspeed_config), mesh, place, initial=found is None)
        state, source = resume.begin(config, found, engine, place)
        begin = functools.partial(begin_records, config, job, state, source, taken_by)
        records = on_first_rank(begin, mesh, place) or Records()
        describe_run(config, engine, place)
        checkpointer = PortableCheckpointer(config, engine, place, inputs.identity, taken_by)
        trainer = Trainer(config, engine, inputs.train, inputs.validation, checkpointer, records, place)
        ended = ""
        try:
            ended = trainer.run(state, stop)
        except TakenOver:
            records = Records()  # they are the later start's
            raise
        except RecycleError as error:
            ended = str(error)
            if isinstance(error, OwnError) and not mesh.is_first:
                tell_alone(error, mesh)
            raise
        except RuntimeError as error:
            ended = str(lost_peer(error) or error)
            raise
        finally:
            records.end(ended or "error", trainer.state.step)
        # somebody may have asked meanwhile that it stops for good
        conclude(job, (stop.poll(0) or ended) if ended in REASONS else ended)
        stop.obeyed()
        return ended


def _ignored(config: RunConfig) -> list[str]:
    """What the configuration asks for that does nothing."""
    training, parallel = config.training, config.parallel
    found = []
    if training.warmup_steps > training.steps:
        found.append(f"training.warmup_steps ({training.warmup_steps}) is cut to training.steps ({training.steps})")
    if parallel.sequence and parallel.tensor == 1:
        found.append("parallel.sequence=true does nothing at parallel.tensor=1")
    return found


def _with_vocabulary(config: RunConfig, vocab_size: int) -> RunConfig:
    """The tokenizer's vocabulary where the model's is not given. Raises ConfigError when the model's is too small."""
    given = config.model.vocab_size
    if given is not None and given < vocab_size:
        raise ConfigError(
            f"model.vocab_size ({given}) is smaller than the tokenizer's vocabulary ({vocab_size}): "
            "raise it, or leave it out"
        )
    model = config.model.model_copy(update={"vocab_size": given or vocab_size})
    return config.model_copy(update={"model": model})


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, or the process's own arguments. Of ranks that share an error the first alone prints it;
    each tells it to the shell of a batch job, since what the user must mend is no reason to start again."""
    import os

    from recycle_ds.parallel.job import job_of, speaks

    first = speaks(os.environ)
    try:
        run_command(app, argv, speak=first, tell=job_of(os.environ).fail)
    except (PeerLost, MachineFault, TakenOver) as lost:  # nothing that the user must mend: a batch job starts again
        if first:
            print(f"error: {lost}", file=sys.stderr, flush=True)
        sys.exit(PEER_LOST)
    except Unheard as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
        _leave(STOPPED_UNHEARD)
    except SystemExit as leaving:
        if leaving.code == 0:
            _leave(0)
        raise


def _leave(code: int) -> None:
    """Ends the process; as it should where ranks were started, and not only help printed."""
    if "deepspeed" in sys.modules:
        from recycle_ds.parallel.rendezvous import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
