"""`generate` of transformers, plain and with prompt lookup, as a peer in comparisons."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recycle_ds.inference.bench.peers import Peer, Task
from recycle_ds.inference.bench.runs import Timed
from recycle_ds.parallel.device import local_device, torch_dtype


def open_transformers(folder: Path, dtype: str, lookups: Mapping[str, int | None]) -> list[Peer]:
    """Loads a Hugging Face folder once, for several peers. lookups: by name, the tokens that prompt lookup drafts, or None.

    dtype: "fp32" or "bf16"; "int8" is decoded in bf16, since transformers has no 8-bit weights for CPUs of its own.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arithmetic = "fp32" if dtype == "fp32" else "bf16"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype(arithmetic)).eval().to(local_device())
    return [Transformers(name, model, arithmetic, lookup) for name, lookup in lookups.items()]


class Transformers:
    """One way of calling `generate`. The key/value cache is on, and attention is PyTorch's own, which are its defaults."""

    def __init__(self, name: str, model: Any, dtype: str, lookup: int | None) -> None:
        self.name, self._model, self._lookup = name, model, lookup
        self.details: dict[str, Any] = {"version": version("transformers"), "dtype": dtype}
        if lookup is not None:
            self.details["prompt_lookup_num_tokens"] = lookup

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[int], task: Task) -> Timed:
        """See `Peer`."""
        from transformers import GenerationConfig, StoppingCriteriaList

        if task.seed is not None:
            torch.manual_seed(task.seed)
        ends = list(task.end_ids) or None
        sampling: dict[str, Any] = {"do_sample": False}
        if task.temperature:
            sampling = {"do_sample": True, "temperature": task.temperature, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=task.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=ends[0] if ends else 0,
            use_cache=True,
            prompt_lookup_num_tokens=self._lookup,
            **sampling,
        )
        ids_1T = torch.tensor([list(prompt_ids)], device=self._model.device)
        stamps: list[tuple[int, float]] = []

        def stamp(tokens_1T: torch.Tensor, _: object, **__: object) -> torch.Tensor:
            """Never stops a text: it is called after every step, with all tokens so far."""
            stamps.append((tokens_1T.shape[1], time.perf_counter()))
            return torch.zeros(len(tokens_1T), dtype=torch.bool, device=tokens_1T.device)

        out_1T = self._model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stamp]),
        )
        end = time.perf_counter()
        new = out_1T[0, len(prompt_ids) :].tolist()
        length, since = stamps[0]
        return Timed(tuple(new), max(len(prompt_ids) + len(new) - length, 0), end - since)

    def close(self) -> None:
        """See `Peer`."""
