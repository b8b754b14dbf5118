"""A module that a job runs in place of a training run: each rank prints its number and what it was given."""

from __future__ import annotations

import os
import socket

if __name__ == "__main__":
    variables = os.environ
    rank = variables.get("RANK", variables.get("SLURM_PROCID"))
    size = variables.get("WORLD_SIZE", variables.get("SLURM_STEP_NUM_TASKS"))
    local = variables.get("LOCAL_RANK", variables.get("SLURM_LOCALID"))
    gpus = variables.get("CUDA_VISIBLE_DEVICES", "")
    print(
        f"\nrank {rank} of {size}, {local} on {socket.gethostname()}, CPUs {variables['OMP_NUM_THREADS']}, GPUs {gpus}\n",
        end="",
    )
