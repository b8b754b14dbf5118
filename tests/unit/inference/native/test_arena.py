"""Memory in huge pages."""

from __future__ import annotations

import gc

import pytest
import torch

from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.native.arena import empty_in_huge_pages


@pytest.mark.parametrize("sizes", [(3, 500_001, 7), (2, 3, 4)], ids=["large", "small"])
def test_a_tensor_has_all_of_its_memory_as_long_as_it_lives(sizes: tuple[int, ...]) -> None:
    """Prevents a cache whose end lies in memory of something else, or whose memory is given back while a view of it is read."""
    tensor = empty_in_huge_pages(*sizes, dtype=torch.bfloat16)
    assert tensor.shape == sizes and tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
    large = tensor.nbytes > 2**23
    assert not large or (tensor.data_ptr() % 2**21 == 0 and tensor.untyped_storage().nbytes() < tensor.nbytes + 2**22)
    tensor[0], tensor[-1] = 1.0, 2.0
    last = tensor[-1, -1]
    other = empty_in_huge_pages(*sizes, dtype=torch.bfloat16).fill_(3.0)
    del tensor
    gc.collect()
    assert torch.equal(last, torch.full_like(last, 2.0)) and bool((other == 3).all())


def test_too_much_memory_is_refused_by_name() -> None:
    """Prevents a traceback of the operating system's error, which does not say how much was asked for."""
    with pytest.raises(DecodingError, match=r"65536\.0 GiB .* lower --kv-memory-gib"):
        empty_in_huge_pages(2**45, dtype=torch.bfloat16)
