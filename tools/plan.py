"""Ranks the layouts of a run that fit a cluster, with memory, traffic, bubble, step time and MFU. Also `recycle-ds plan`."""

from __future__ import annotations

from recycle_ds.planning.command import main

if __name__ == "__main__":
    main()
