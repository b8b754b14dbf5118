"""What a preparation made of a source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from recycle_ds.data.encoding import SpecialTokenCounts
from recycle_ds.data.reading.report import ReadReport, counted


@dataclass(frozen=True)
class SplitReport:
    """One token file that was written."""

    prefix: str
    """Its path, without the suffix."""
    documents: int
    """Documents in it."""
    tokens: int
    """Tokens in it, end-of-document tokens included."""


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` made."""

    source: str
    """What was tokenised."""
    train: SplitReport
    """Documents to train on."""
    validation: SplitReport | None
    """Documents held out; None if the fraction is 0."""
    blank: int
    """Documents without text, which were left out."""
    reading: ReadReport = field(default_factory=ReadReport)
    """What was read of the source, and what was left out."""
    special: SpecialTokenCounts = field(default_factory=SpecialTokenCounts)
    """Special tokens that are written in documents."""
    parse_special: bool = False
    """Whether these stand for themselves in the token files; else they are text there."""

    def lines(self, *, read: bool = True) -> Iterator[str]:
        """What a user must know of the source, one fact per line. read: whether to list what was read."""
        yield from self.reading.lines(read=read)
        if self.blank:
            yield f"left out: {counted(self.blank, 'blank document')}"
        if self.special.documents:
            tokens = ", ".join(f"{token} ({count:,})" for token, count in self.special.tokens.most_common(5))
            more = ", ..." if len(self.special.tokens) > 5 else ""
            meaning = "stand for themselves" if self.parse_special else "encoded as text; --parse-special changes that"
            documents = counted(self.special.documents, "document")
            yield f"special tokens written in {documents}, {meaning}: {tokens}{more}"
