"""What a cache holds of its slots besides keys and values, as the kernels read it: see `Contents` in c/stack.h.

With it, a stack looks up embeddings itself, and reads and keeps states: small copies, which as PyTorch's operations took a
twentieth of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recycle_ds.inference.native.stack_structs import ContentsStruct


class Contents:
    """The tokens and states of a cache, and the embeddings of the tokens."""

    def __init__(self, embedding_VD: Tensor, ids: Tensor, states: Tensor) -> None:
        """embedding_VD: bf16. ids: int64 [slots]. states: bf16 [slots, D], or with what tapped states add to the recycle
        module's input in further columns; no rows: none are kept."""
        assert embedding_VD.dtype == torch.bfloat16 and embedding_VD.is_contiguous()
        assert ids.dtype == torch.int64 and ids.is_contiguous()
        assert not len(states) or (states.dtype == torch.bfloat16 and states.is_contiguous())
        self._kept = (embedding_VD, ids, states)
        self.struct = ContentsStruct(
            embedding_VD.data_ptr(), ids.data_ptr(), states.data_ptr() if len(states) else None, states.shape[1]
        )
