"""A module that a job runs in place of a training run: each rank prints its number and what it was given."""

from __future__ import annotations

import os
import socket

if __name__ == "__main__":
    given = os.environ
    rank, size = (
        given.get("RANK", given.get("SLURM_PROCID")),
        given.get("WORLD_SIZE", given.get("SLURM_STEP_NUM_TASKS")),
    )
    place = f"{given.get('LOCAL_RANK', given.get('SLURM_LOCALID'))} on {socket.gethostname()}"
    devices = f"CPUs {given.get('SLURM_CPUS_PER_TASK')}, GPUs {given.get('CUDA_VISIBLE_DEVICES', '')}"
    print(f"\nrank {rank} of {size}, {place}, {devices}\n", end="")
