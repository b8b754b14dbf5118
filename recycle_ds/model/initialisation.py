"""Initial weights as a function of (seed, canonical name): equal at every layout."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from recycle_ds.config import ModelConfig
from recycle_ds.model.sharding import pieces
from recycle_ds.parallel.mesh import Mesh

# Projections back into the residual stream, whose sum grows with depth (GPT-2, section 2.3).
_RESIDUAL = re.compile(r"\.(attention\.output|mlp\.down)\.weight$")


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, mesh: Mesh, seed: int) -> None:
    """Fills every parameter: norms with 1, biases and vocabulary padding with 0, matrices from N(0, init_std^2)."""
    for name, value in initial_values(model, config, mesh, seed):
        model.get_parameter(name).copy_(value)


def initial_values(model: nn.Module, config: ModelConfig, mesh: Mesh, seed: int | None) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 value of this rank's whole local parameters, one at a time; of ZeRO-3's too, which stay partitioned.

    seed None draws nothing: zeros, to be replaced.
    """
    for name, row in pieces(model, mesh).items():
        parameter = model.get_parameter(name)
        value = torch.zeros(tuple(getattr(parameter, "ds_shape", parameter.shape)))
        for piece in row if seed is not None else ():
            assert seed is not None
            full = initial_tensor(piece.name, piece.shape, config, seed)
            part = full.narrow(piece.axis, piece.start, piece.length)
            value.narrow(piece.axis, piece.local_start, piece.length).copy_(part)
        yield name, value


def initial_tensor(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The whole canonical tensor `name`, fp32, drawn on the CPU so that no device's generator matters."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    deviation = config.init_std / math.sqrt(2 * config.layers) if _RESIDUAL.search(name) else config.init_std
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)
