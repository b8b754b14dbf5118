"""Tokenises a corpus into the token files that pretraining reads. Also `recycle-ds prepare`."""

from __future__ import annotations

from recycle_ds.data.prepare_command import main

if __name__ == "__main__":
    main()
