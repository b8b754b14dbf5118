"""Lets a model write text, to train a recycle module on. Ranks of any launcher share the rows."""

from __future__ import annotations

from recycle_ds.inference.self_text.command import main

if __name__ == "__main__":
    main()
