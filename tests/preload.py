"""Imports what nearly every rank of a test needs. The harness's fork server imports this module once for all ranks.

No thread may be started here, because threads do not survive a fork.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    import deepspeed
    import megatron.core.tensor_parallel  # noqa: F401

    import recycle_ds.pretrain
    import recycle_ds.training.loop  # noqa: F401

# otherwise the first use compiles the op, which takes 25 s and holds a lock
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
