"""Shows what a checkpoint or model folder holds and how two of them differ. Also `recycle-ds inspect`."""

from __future__ import annotations

from recycle_ds.checkpoint.conversion.inspect_command import main

if __name__ == "__main__":
    main()
