"""`python -m tests.serving.hindered ...`: the serve command with an engine whose steps are slow, or fail.

STEP_SECONDS: what each step takes longer. FAIL_AT: number of the step that fails, from 1 on, measurements included.
"""

from __future__ import annotations

import os
import time
from typing import Any

from recycle_ds.inference.engine.engine import DecodingEngine


def hinder() -> None:
    """Replaces the engine's step."""
    seconds, left = float(os.environ.get("STEP_SECONDS", "0")), int(os.environ.get("FAIL_AT", "0"))
    step = DecodingEngine._step

    def hindered(self: DecodingEngine) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError("the device is gone")
        time.sleep(seconds)
        return step(self)

    DecodingEngine._step = hindered  # type: ignore[method-assign]


if __name__ == "__main__":
    from recycle_ds.serve import main

    hinder()
    main()
