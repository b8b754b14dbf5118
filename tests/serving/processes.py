"""Servers in processes of their own, as a user starts them: alone, or as ranks of a launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from recycle_ds.checkpoint.huggingface.writing import write_hugging_face
from recycle_ds.checkpoint.loading import LoadedModel
from tests.distributed import free_port
from tests.runs import ROOT
from tests.unit.checkpoint.memory import ModelSource


@dataclass
class Process:
    """A server's ranks. errors: the files that their stderr goes to."""

    ranks: list[subprocess.Popen[bytes]]
    errors: list[Path]
    url: str
    client: httpx.Client

    def status(self, path: str) -> int | None:
        """Status of a GET; None if nothing answers."""
        try:
            return self.client.get(self.url + path).status_code
        except httpx.TransportError:
            return None

    def until_ready(self, seconds: float = 120) -> None:
        """Waits until the model is loaded."""
        deadline = time.monotonic() + seconds
        while self.status("/ready") != 200:
            assert self.ranks[0].poll() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.1)

    def complete(self, prompt: str | list[int], tokens: int, **fields: Any) -> httpx.Response:
        """POST /v1/completions."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True} | fields
        return self.client.post(f"{self.url}/v1/completions", json=body)

    def stream(self, prompt: str | list[int], tokens: int, **fields: Any) -> Iterator[dict[str, Any]]:
        """The same, streamed: the objects of the events as they come."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True} | fields
        with self.client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))

    def wait(self, seconds: float = 60) -> list[int]:
        """The ranks' exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [rank.wait(max(deadline - time.monotonic(), 0.1)) for rank in self.ranks]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server does not end\n{self.output()}") from None

    def output(self, rank: int | None = None) -> str:
        """What the ranks, or one of them, wrote to stderr."""
        files = self.errors if rank is None else [self.errors[rank]]
        return "\n".join(file.read_text(errors="replace") for file in files)


def write_model(loaded: LoadedModel, folder: Path) -> None:
    """Writes a model to a new folder, with its tokenizer and chat template."""
    folder.mkdir(parents=True)
    source = ModelSource(loaded.model, loaded.model.config, loaded.model.recycle_config, loaded.path)
    source.tokenizer = loaded.path / "tokenizer.json"
    write_hugging_face(source, folder, None, 2**30, lambda name: None)


@contextmanager
def started(
    folder: Path, model: Path, *options: str, ranks: int = 1, module: str = "recycle_ds.serve", **variables: str
) -> Iterator[Process]:
    """Starts a server, with ranks as torchrun starts them, and kills what is left of it at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    port, group = free_port(), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "RECYCLE_"))}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(folder)} | variables
    errors, processes = [folder / f"stderr-{rank}" for rank in range(ranks)], []
    command = [sys.executable, "-m", module, "--model", str(model), "--port", str(port), "--max-batch", "4", *options]
    try:
        for rank, file in enumerate(errors):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            with file.open("wb") as stream:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment | (group | own if ranks > 1 else {}),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stream,
                )
            processes.append(process)
        with httpx.Client(timeout=60, trust_env=False) as client:
            yield Process(processes, errors, f"http://127.0.0.1:{port}", client)
    finally:
        for process in processes:
            process.kill()
            process.wait()
