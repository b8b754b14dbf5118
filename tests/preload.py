"""What nearly every rank of a test imports. The harness's fork server imports it once; ranks are forked from there in no time.

No thread may be started here: a forked process has none of them.
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

# the op would be compiled at the first use, 25 s, behind a lock
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
