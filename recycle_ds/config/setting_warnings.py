"""Settings that have no effect or are probably a mistake."""

from __future__ import annotations

from recycle_ds.config.schema import RunConfig


def setting_warnings(config: RunConfig, *, resumed: bool) -> list[str]:
    """One line for each. resumed: whether the run resumes from a checkpoint."""
    training, parallel = config.training, config.parallel
    found = []
    if training.warmup_steps > training.steps:
        found.append(f"training.warmup_steps ({training.warmup_steps}) is reduced to training.steps ({training.steps})")
    if parallel.sequence and parallel.tensor == 1:
        found.append("parallel.sequence=true does nothing at parallel.tensor=1")
    if config.recycle.gradient == "frozen_backbone" and config.init_from is None and not resumed:
        found.append(
            "recycle.gradient=frozen_backbone without init_from: the module is trained on a backbone of random weights that "
            "stays as it is; name the folder of a trained model, init_from=FOLDER"
        )
    return found
