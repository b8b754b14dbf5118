"""Converts weights between formats: Hugging Face, portable, Megatron, DeepSpeed's own. Also `recycle-ds convert`."""

from __future__ import annotations

from recycle_ds.checkpoint.conversion.command import main

if __name__ == "__main__":
    main()
