"""A server of several ranks: the first one serves HTTP, the others follow."""

from __future__ import annotations

import asyncio
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.inference import SamplingParams
from recycle_ds.inference.engine.build import team_engine
from recycle_ds.inference.engine.team import build_team
from recycle_ds.inference.parameters import MODES
from recycle_ds.model import build_model
from recycle_ds.parallel.peers import PEER_LOST
from recycle_ds.serving.events import Finished
from recycle_ds.serving.worker import Worker
from tests.distributed import run_ranks
from tests.parallel.test_engine import CONFIG, RECYCLE
from tests.serving.processes import Process, started
from tests.serving.servers import engine_of, until

PROMPTS = ("the cat", "하늘이", "naïve café", "고양이가 앉았다! 하늘이 맑다. naïve")
TOKENS = 24


def expected(loaded: LoadedModel) -> dict[tuple[str, str], str]:
    """Answers of an engine in this process, by prompt and mode."""
    engine, tokenizer, found = engine_of(loaded), loaded.tokenizer, {}
    for prompt in PROMPTS:
        for mode in MODES:
            params = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
            (sequence,) = engine.add(tokenizer.encode(prompt), params, mode)
            engine.finish([sequence])
            found[prompt, mode] = tokenizer.decode(sequence.tokens[sequence.prompt_tokens :])
    return found


def check_answers(server: Process, answers: dict[tuple[str, str], str]) -> None:
    """Asserts that the server answers so, to more requests at once than its batch holds."""
    server.until_ready()
    with ThreadPoolExecutor(len(answers)) as pool:
        found = pool.map(lambda key: server.complete(key[0], TOKENS, mode=key[1]).json(), answers)
    assert [one["choices"][0]["text"] for one in found] == list(answers.values())


def test_tensor_ranks_answer_and_shut_down(loaded: LoadedModel, model_folder: Path, tmp_path: Path) -> None:
    """Prevents tensor ranks from answering otherwise than a single process, and ranks that are left over, or fail, when the
    server shuts down."""
    with started(tmp_path, model_folder, "--tensor", "2", ranks=2) as server:
        check_answers(server, expected(loaded))
        for rank in reversed(server.ranks):  # as a launcher does, to all of them
            rank.send_signal(signal.SIGTERM)
        assert server.wait() == [0, 0], server.output()
        lines = [
            line for line in server.output().splitlines() if line and not line.startswith(("{", "note: measuring"))
        ]
        assert lines == [f"serving {model_folder} at {server.url}"], server.output()


def test_pipeline_ranks_answer_until_one_dies(loaded: LoadedModel, model_folder: Path, tmp_path: Path) -> None:
    """Prevents stages from answering otherwise than a single process, a server with a dead rank that looks healthy and answers
    nothing, a job that never ends, and an error without the rank."""
    slow = {"module": "tests.serving.hindered", "STEP_SECONDS": "0.01"}
    with started(tmp_path, model_folder, "--pipeline", "2", ranks=2, **slow) as server:
        check_answers(server, expected(loaded))
        events = server.stream(PROMPTS[0], 100, mode="autoregressive")
        assert "error" not in next(events)
        server.ranks[1].kill()
        until(lambda: server.status("/health") == 503)
        assert [event["error"]["message"] for event in events if "error" in event] == [
            "the answer was not completed: a rank of the server is lost; its log names it"
        ]
        assert server.wait() == [PEER_LOST, -signal.SIGKILL], server.output()
    errors = [line for line in server.output().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: rank 1 has shown no sign of life"), server.output()
    assert "Traceback" not in server.output()


def _idle(rank: int, world_size: int, seconds: float) -> int:
    """Serves a request before and after a pause that is longer than the timeout of the process groups."""
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=seconds))
    team = build_team(1, 2, torch.device("cpu"))
    engine = team_engine(build_model(CONFIG, RECYCLE, team.mesh, seed=5).eval(), team, max_batch=2)
    if engine is None:
        return 0
    worker = Worker(engine, keep_alive=seconds / 8)

    async def main() -> int:
        tokens = 0
        for pause in (0.0, 2 * seconds):
            await asyncio.sleep(pause)
            async for event in worker.submit([1, 2], SamplingParams(max_new_tokens=8)):
                tokens += len(event.generation.token_ids) if isinstance(event, Finished) else 0
        return tokens

    worker.start()
    tokens = asyncio.run(main())
    worker.drain()
    assert worker.join(30)
    return tokens


def test_an_idle_server_outlives_the_timeout_of_its_process_groups() -> None:
    """Prevents a server that nobody used for some hours from dying because its ranks waited for a step."""
    assert run_ranks(_idle, 2, 2.0) == [16, 0]
