"""What each rank of a team reads of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from recycle_ds.checkpoint import loading
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.inference.engine.build import team_engine
from recycle_ds.inference.engine.team import build_team
from recycle_ds.inference.errors import DecodingError
from tests.distributed import run_ranks


def _read(rank: int, world_size: int, folders: list[str]) -> list[tuple[str, int, int, int]]:
    """Per folder and layout: numbers read, numbers of this rank's shard, numbers of the model."""
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    found = []
    teams = {"tensor": build_team(2, 1, torch.device("cpu")), "pipeline": build_team(1, 2, torch.device("cpu"))}
    with pytest.MonkeyPatch.context() as patch:
        count = 0

        def counting(folder: Path) -> Any:
            source = open_source(folder)
            read = source.read

            def counted(*arguments: Any, **named: Any) -> torch.Tensor:
                nonlocal count
                tensor = read(*arguments, **named)
                count += tensor.numel()
                return tensor

            patch.setattr(source, "read", counted)
            return source

        open_source = loading._open
        patch.setattr(loading, "_open", counting)
        for folder in folders:
            for layout, team in teams.items():
                count = 0
                model = loading.load_model(folder, mesh=team.mesh).model
                own, read = sum(one.numel() for one in model.parameters()), count
                whole = sum(one.numel() for one in loading.load_model(folder).model.parameters())
                found.append((f"{Path(folder).name}, {layout}", read, own, whole))
    return found


def _refused(rank: int, world_size: int, folder: str) -> str:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    team = build_team(1, 2, torch.device("cpu"))
    model = loading.load_model(folder, mesh=team.mesh).model
    with pytest.raises(DecodingError) as error:
        team_engine(model, team)
    return str(error.value)


def test_all_ranks_refuse_what_one_has(model: Path, tmp_path: Path) -> None:
    """Prevents a stage that leaves without a word because of weights that are no numbers, and others that wait for it."""
    convert(str(model), str(tmp_path / "hf"), Conversion("hf"))
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    messages = run_ranks(_refused, 2, str(tmp_path / "hf"), timeout=100)
    assert (
        messages
        == ["the model's final_norm.weight has a weight that is not a finite number: take an earlier checkpoint"] * 2
    )


def test_a_rank_reads_its_part_alone(model: Path, tmp_path: Path) -> None:
    """Prevents ranks that each read the whole model: eight on a host would need eight times its memory and time."""
    folders = [str(model)]
    for name in ("hf", "megatron"):
        convert(str(model), str(tmp_path / name), Conversion(name))
        folders.append(str(tmp_path / name))
    by_rank = run_ranks(_read, 2, folders, timeout=200)
    assert len(by_rank[0]) == 6
    for one, other in zip(*by_rank, strict=True):
        for what, read, own, whole in (one, other):
            assert read <= own < 0.8 * whole, what
        assert one[2] + other[2] >= one[3], one[0]
