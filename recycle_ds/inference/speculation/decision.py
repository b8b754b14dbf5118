"""What the draft budget decided in a step, and why."""

from __future__ import annotations

from dataclasses import dataclass

from recycle_ds.inference.speculation.cost_model import CostModel


@dataclass(frozen=True)
class Decision:
    """One step's budget. adaptive: sequences whose drafts are budgeted. drafts: could be verified. tokens: of the full
    call, one of each sequence and the verified drafts. made_next: the greatest depth of a tree that is made next. expected:
    tokens that the step yields."""

    sequences: int
    adaptive: int
    drafts: int
    tokens: int
    made_next: int
    expected: float

    def explained(self, costs: CostModel) -> str:
        """As a sentence."""
        count, tokens, full = self.sequences, self.tokens, costs.full_call
        first = costs.drafts(self.adaptive, 1)
        further = costs.drafts(self.adaptive, 2) - first
        return (
            f"{count} sequences: {tokens - count} of {self.drafts} drafts verified, trees at most {self.made_next} "
            f"deep made next. Full call over {tokens} tokens {1e3 * full(tokens):.1f} ms, over {count} "
            f"{1e3 * full(count):.1f} ms; drafts of the first depth {1e3 * first:.1f} ms, of a further one "
            f"{1e3 * further:.1f} ms; expected tokens {self.expected:.2f}"
        )
