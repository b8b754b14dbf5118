"""Trains a byte-level BPE tokenizer on a corpus. Also `recycle-ds tokenizer`."""

from __future__ import annotations

from recycle_ds.data.tokenizer_command import main

if __name__ == "__main__":
    main()
