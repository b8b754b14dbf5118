"""The report's page refers to nothing outside, and no text of a run becomes an element or a script."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from recycle_ds.training.reporting.run_report.page import render
from recycle_ds.training.reporting.sessions import Session
from tests.unit.training.report_reading import page_data, read
from tests.unit.training.written_runs import STARTED, evaluation, step, write_run


class References(HTMLParser):
    """Collects what a page refers to, and the elements and attributes that run scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attributes:
            if name in ("href", "src", "srcset", "action", "data", "xlink:href", "poster") and not (
                value or ""
            ).startswith("#"):
                self.found.append(f"{tag} {name}={value}")
            assert not name.startswith("on"), (tag, name)


def test_the_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    """Prevents a report that loads something from the network, or from files beside it."""
    page = render(read(write_run(tmp_path / "run", [step(1, 5.0), step(2, 4.0), evaluation(2, 3.0)])))
    references = References()
    references.feed(page)
    assert references.found == ["link href=data:,"]
    assert not re.search(r"https?:|@import|//\w|url\((?!#)|\bimport\s", re.sub(r"// [A-Z].*", "", page))
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


EVIL = "</script></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def test_text_of_the_files_is_escaped(tmp_path: Path) -> None:
    """Prevents names, messages and settings in a run's files from becoming elements or scripts of the page."""
    records = [
        *(step(number, 5.0, grad_norm_by_part={EVIL: 1.0}) for number in (1, 2, 3)),
        {"event": EVIL, "step": 2, "host": EVIL, EVIL: EVIL},
    ]
    sessions = [Session(STARTED, 0, 3, EVIL, STARTED + 5, EVIL, anomalies={EVIL: 1})]
    folder = write_run(
        tmp_path / EVIL.replace("/", "|"), records, config=json.dumps({EVIL: {EVIL: EVIL}}), sessions=sessions
    )
    (folder / "error.txt").write_text(EVIL)
    layout = json.loads((folder / "run.json").read_text()) | {"dtype": EVIL}
    (folder / "run.json").write_text(json.dumps(layout))
    checkpoint = folder / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    provenance = {"git": EVIL, "packages": {EVIL: EVIL}, "command": [EVIL]}
    (checkpoint / "manifest.json").write_text(json.dumps({"provenance": provenance}))
    other = write_run(tmp_path / "other", [step(1, 4.0)])
    for runs in (read(folder), read(folder, other)):
        references = References()
        page = render(runs)
        references.feed(page)
        assert references.scripts == 2, "the page's own data and script"
        assert "<img" not in page and "alert(1)</script>" not in page
        assert html.escape(EVIL, quote=False)[:40] in page.replace("&#34;", '"').replace("&#39;", "'")
        page_data(page)
