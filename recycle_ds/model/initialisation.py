"""Initial weights as a function of (seed, canonical name): the same for every parallel layout."""

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
from recycle_ds.parallel.partitions import local_shape

# Projections that add to the residual stream: scaled down, since the sum grows with depth (GPT-2, section 2.3).
_RESIDUAL = re.compile(r"\.(attention\.output|mlp\.down)\.weight$")


# Projections that are added to what a trained module computes: zero, so that its output stays what it was.
_ADDED = re.compile(r"^recycle\.(tap_projection|confidence)\.weight$")


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, mesh: Mesh, seed: int) -> None:
    """Fills every parameter: norms with 1, biases, taps, confidence and vocabulary padding with 0, other matrices
    from N(0, init_std^2)."""
    for name, value in initial_values(model, config, mesh, seed):
        model.get_parameter(name).copy_(value)


def initial_values(model: nn.Module, config: ModelConfig, mesh: Mesh, seed: int | None) -> Iterator[tuple[str, Tensor]]:
    """Yields name and full fp32 value of each of this rank's parameters. ZeRO-3's parameters stay partitioned.

    seed=None yields zeros, to be replaced by a checkpoint.
    """
    for name, row in pieces(model, mesh).items():
        parameter = model.get_parameter(name)
        value = torch.zeros(local_shape(parameter))
        for piece in row if seed is not None else ():
            assert seed is not None
            full = initial_tensor(piece.name, piece.shape, config, seed)
            part = full.narrow(piece.axis, piece.start, piece.length)
            value.narrow(piece.axis, piece.local_start, piece.length).copy_(part)
        yield name, value


def initial_tensor(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The full canonical tensor `name` in fp32, drawn on the CPU so that the values do not depend on the device."""
    if name.endswith(".bias") or _ADDED.search(name):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = config.init_std / math.sqrt(2 * config.layers) if _RESIDUAL.search(name) else config.init_std
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
