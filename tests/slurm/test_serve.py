"""A server as a batch job: two tasks hold the model, and the job is drained before its end."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import httpx
import pytest

from recycle_ds.data.tokenizer import Tokenizer
from tests.serving.processes import write_model
from tests.serving.servers import make_model
from tests.slurm.jobs import Jobs

pytestmark = pytest.mark.slurm
TIME = ("--time=10",)


def test_a_server_that_is_drained_at_the_end_of_its_job(jobs: Jobs, tmp_path: Path) -> None:
    """Prevents a server whose address nobody finds, ranks that do not form one model, and a job that is requeued, fails,
    stays, or cuts off an open stream at a planned end."""
    model = tmp_path / "tiny"
    write_model(make_model(tmp_path / "source"), model)
    job = jobs.submit("serve.sbatch", "--model", str(model), "--tensor", "2", options=TIME, nodes=2, tasks=1)
    address = re.compile(r"serving \S+ at (http://127\.0\.0\.1:(\d+)) of (\S+), for programs there")
    jobs.until(lambda: address.search(jobs.log(job)) is not None, job)
    found = address.search(jobs.log(job))
    assert found is not None
    url, port, node = found.groups()
    assert int(port) == 30000 + int(job) % 2000 and node in jobs.cluster.nodes and node != socket.gethostname()
    jobs.until(lambda: '"ready after' in jobs.log(job), job)
    tokens = Tokenizer.load(model).encode("the cat")
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": tokens, "max_tokens": 8}, timeout=60, trust_env=False)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 8, answer.text
    # a request that takes many batches, so that it is open when the job must end
    body = {"prompt": [tokens] * 16, "n": 16, "max_tokens": 48, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60, trust_env=False) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: "), "the stream has not begun"
        jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    reasons = [choice["finish_reason"] for event in events for choice in event.get("choices", ())]
    assert reasons.count("length") == 256 and not [event for event in events if "error" in event], jobs.log(job)
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    assert jobs.field(job, "Restarts") == "0", jobs.log(job)
    completed = re.search(r'"the job ends: (\d+) answers are completed', jobs.log(job))
    assert completed is not None and int(completed[1]) > 0, jobs.log(job)
    assert jobs.log(job).splitlines()[-1].endswith("the ranks exited with code 0, outcome: finished"), jobs.log(job)
