"""`python -m tests.serving.hindered ...`: the serve command with an engine whose steps are slow, or fail.

STEP_SECONDS: what each step takes longer. FAIL_AT: number of the step that fails, from 1 on, measurements included.
"""

from __future__ import annotations

import os
import time
from typing import Any

from recycle_ds.inference.engine.engine import DecodingEngine


def hinder() -> None:
    """Replaces what every step of the engine begins with."""
    seconds, left = float(os.environ.get("STEP_SECONDS", "0")), int(os.environ.get("FAIL_AT", "0"))
    start = DecodingEngine._start_steps

    def hindered(self: DecodingEngine) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError("the device is gone")
        time.sleep(seconds)
        return start(self)

    DecodingEngine._start_steps = hindered  # type: ignore[method-assign]


if __name__ == "__main__":
    from recycle_ds.serve import main

    hinder()
    main()
