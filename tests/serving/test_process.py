"""The server as a process: its port, its answers, its signals and its end."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.inference import SamplingParams
from recycle_ds.serving.process.errors import ServingError
from recycle_ds.serving.process.listening import announcement, listen, url_of
from recycle_ds.serving.process.stopping import JOB_ENDS, StopSignals
from tests.runs import ROOT
from tests.serving.processes import Process, started
from tests.serving.servers import engine_of, until

SLOW = {"module": "tests.serving.hindered", "STEP_SECONDS": "0.03"}
PROMPT = "the cat"
LOST = "the answer was not completed: "


def expected_text(loaded: LoadedModel, tokens: int, prompt: str = PROMPT) -> str:
    """The engine's own answer."""
    engine = engine_of(loaded, max_batch=1)
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    (sequence,) = engine.add(loaded.tokenizer.encode(prompt), params, "autoregressive")
    engine.finish([sequence])
    return loaded.tokenizer.decode(sequence.tokens[sequence.prompt_tokens :])


class Reader(threading.Thread):
    """Reads a stream in a thread of its own."""

    def __init__(self, server: Process, tokens: int, prompt: str = PROMPT, mode: str = "autoregressive") -> None:
        super().__init__(daemon=True)
        self._server, self._tokens, self.prompt, self._mode = server, tokens, prompt, mode
        self.text, self.events, self.errors = "", 0, []  # type: ignore[var-annotated]
        self.start()

    def run(self) -> None:
        with contextlib.suppress(httpx.RemoteProtocolError):  # the server was killed
            self._read()

    def _read(self) -> None:
        for event in self._server.stream(self.prompt, self._tokens, mode=self._mode):
            self.events += 1
            if "error" in event:
                self.errors.append(event["error"]["message"])
            for choice in event.get("choices", []):
                self.text += choice["text"]

    def begun(self) -> Reader:
        """Waits for the first text."""
        until(lambda: self.text != "", 60)
        return self

    def ended(self) -> Reader:
        """Waits for the end."""
        self.join(60)
        assert not self.is_alive()
        return self


def accepted(server: Process) -> float:
    """Requests that have been answered or will be."""
    values = dict(
        re.findall(r"^(recycle_request\S+) (\S+)$", server.client.get(f"{server.url}/metrics").text, re.MULTILINE)
    )
    answered = values.get('recycle_requests_total{route="/v1/completions",status="200"}', "0")
    return float(values["recycle_requests_running"]) + float(answered)


def test_sigterm_completes_what_was_accepted(
    loaded: LoadedModel, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a restart of a loaded server from losing accepted requests or taking new ones, a port in use that is noticed
    late or with a trace, and an exit code other than 0 after an orderly end."""
    options = ("--served-model-name", "small", "--max-batch", "16")
    with started(tmp_path, model_folder, *options, **SLOW) as server, ThreadPoolExecutor(4) as pool:
        until(lambda: "serving" in server.output())
        port = server.url.rpartition(":")[2]
        command = [sys.executable, "-m", "recycle_ds.serve", "--model", str(model_folder), "--port", port]
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 2
        assert second.stderr == (
            f"error: port {port} of 127.0.0.1 is in use by another process: choose another one (--port N; 0 takes any "
            "free one)\n"
        )
        server.until_ready()
        assert server.complete(PROMPT, 30).json()["choices"][0]["text"] == expected_text(loaded, 30)
        texts = {prompt: expected_text(loaded, 50, prompt) for prompt in (PROMPT, "on the mat", "\ud558\ub298")}
        prompts = (list(texts) * 11)[:32]
        modes = ("autoregressive", "verified")
        readers = [Reader(server, 50, prompt, modes[number % 2]) for number, prompt in enumerate(prompts)]
        complete = [pool.submit(server.complete, prompt, 50) for prompt in texts]
        until(lambda: accepted(server) == 1 + len(readers) + len(complete))  # half of them wait
        start = time.monotonic()
        server.ranks[0].send_signal(signal.SIGTERM)
        until(lambda: server.status("/ready") == 503)
        for refused in (server.complete(PROMPT, 3), server.complete(PROMPT, 3, stream=True)):
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            assert int(refused.headers["retry-after"]) > 0
        assert server.status("/health") == 200
        assert [reader.ended().text for reader in readers] == [texts[prompt] for prompt in prompts]
        assert [one.result().json()["choices"][0]["text"] for one in complete] == list(texts.values())
        assert server.wait() == [0], server.output()
        assert "Traceback" not in server.output()
        with capsys.disabled():
            print(
                f"\n{len(readers) + len(complete)} requests, {time.monotonic() - start:.1f} s from SIGTERM to exit code 0"
            )
    first = server.output().splitlines()[0]
    assert first == f"serving {model_folder} at {server.url}"


def test_a_drain_has_an_end(model_folder: Path, tmp_path: Path) -> None:
    """Prevents a shutdown that takes as long as the longest answer, and an answer that is cut off without an error."""
    with started(tmp_path, model_folder, "--drain-seconds", "0.3", "--log-level", "warning", **SLOW) as server:
        server.until_ready()
        reader = Reader(server, 110).begun()
        server.ranks[0].send_signal(signal.SIGINT)
        assert reader.ended().errors == [f"{LOST}the server is shutting down, 0.3 s after it was asked to"]
        assert server.wait() == [0], server.output()
    assert "answers that are not complete after 0.3 s: 1" in server.output()


def test_a_second_signal_ends_the_server_at_once(model_folder: Path, tmp_path: Path) -> None:
    """Prevents a user from having to wait for a drain, and two signals of one Ctrl-C from being taken for two wishes."""
    with started(tmp_path, model_folder, module="tests.serving.hindered", STEP_SECONDS="0.3") as server:
        server.until_ready()
        Reader(server, 110).begun()
        server.ranks[0].send_signal(signal.SIGINT)
        server.ranks[0].send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert server.ranks[0].poll() is None, server.output()
        server.ranks[0].send_signal(signal.SIGTERM)
        assert server.wait(10) == [128 + signal.SIGTERM], server.output()
    assert server.output().splitlines()[-1] == "SIGTERM, the second signal: the process ends at once"


def test_a_broken_engine_ends_the_server(model_folder: Path, tmp_path: Path) -> None:
    """Prevents a server that answers nothing any more and is not restarted, clients that wait for it, and a client that
    never sends the rest of its request and so keeps the process from ending."""
    hindered = {"module": "tests.serving.hindered", "STEP_SECONDS": "0.01", "FAIL_AT": "30"}
    with started(tmp_path, model_folder, "--body-seconds", "900", **hindered) as server, socket.socket() as silent:
        server.until_ready()
        silent.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        silent.sendall(f"{head}content-length: 50\r\n\r\n{{".encode())
        reader = Reader(server, 110)
        until(lambda: server.status("/health") == 503)
        assert server.client.get(f"{server.url}/health").json()["error"]["code"] == "failed"
        assert reader.ended().errors == [f"{LOST}the engine failed: RuntimeError: the device is gone"]
        assert server.wait() == [1], server.output()
    lines = server.output().splitlines()
    assert lines[-1] == "error: the engine failed: RuntimeError: the device is gone"
    assert sum("Traceback" in line for line in lines) == 1, "the trace is logged once"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tensor", "2"), "1 rank, but --tensor x --pipeline = 2: start 2 with torchrun, deepspeed, srun or mpirun"),
        (("--kv-memory-gib", "1e-9"), "too little memory for a KV cache"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    options: tuple[str, ...], words: str, model_folder: Path, tmp_path: Path
) -> None:
    """Prevents a trace, or a server that never becomes ready, after a setting that cannot work."""
    with started(tmp_path, model_folder, *options) as server:
        assert server.wait() == [2], server.output()
    errors = [line for line in server.output().splitlines() if not line.startswith(("serving", "{"))]
    assert len(errors) == 1 and errors[0].startswith(f"error: {words}"), errors


def test_a_job_that_ends_stops_the_server(tmp_path: Path) -> None:
    """Prevents a server that SLURM kills with open requests: the shell's file was not seen, or no signal was sent."""
    file, now = tmp_path / "stop", time.time()
    stop = StopSignals(file, now + 3600)
    assert stop.poll() is None
    file.touch()
    until(lambda: stop.poll() == JOB_ENDS)
    assert StopSignals(None, now).poll() == JOB_ENDS
    assert StopSignals().poll() is None


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 70000, "must be from 0"),
        ("192.0.2.1", 0, "must be an address of this machine"),
        ("no such host", 0, "give an address of this machine"),
    ],
)
def test_an_address_that_cannot_be_used(host: str, port: int, words: str) -> None:
    """Prevents a trace, or a message that does not say which option is wrong."""
    with pytest.raises(ServingError, match=words):
        listen(host, port)


def test_the_address_that_is_printed() -> None:
    """Prevents a user of a batch job from looking for the address, and an address that no client can use."""
    found: Any
    with listen("127.0.0.1", 0) as found:
        port, node = found.getsockname()[1], socket.gethostname()
        assert announcement("demo", found, in_job=False) == f"serving demo at http://127.0.0.1:{port}"
        assert announcement("demo", found, in_job=True).endswith(f"ssh -N -L {port}:127.0.0.1:{port} {node}")
    with listen("0.0.0.0", 0) as found:
        assert url_of(found) == f"http://{node}:{found.getsockname()[1]}"
        assert "ssh" not in announcement("demo", found, in_job=True)
