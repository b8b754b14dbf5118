"""The report in a browser: wide and narrow, light and dark; nothing overlaps, nothing is loaded, no error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.report import published_checkpoints
from recycle_ds.training.reporting.run_report.page import render
from recycle_ds.training.reporting.run_report.runs import read_runs
from recycle_ds.training.reporting.sessions import Session
from tests.browser import chromium
from tests.unit.training.written_runs import STARTED, evaluation, step, write_run

# Pairs of boxes that overlap although they are side by side: cards, headings and lists of the page, texts inside each plot.
_OVERLAPS = """
() => {
  const groups = [
    [...document.querySelectorAll("main > section > *, article > *, header > *")],
    [...document.querySelectorAll(".plot")],
    ...[...document.querySelectorAll(".plot")].map((plot) => [...plot.children]),
    ...[...document.querySelectorAll(".legend, .parts, .runs, .facts, .keys")].map((list) => [...list.children]),
    ...[...document.querySelectorAll("svg")].map((svg) => [...svg.querySelectorAll("text")]),
  ];
  const found = [];
  for (const group of groups) {
    const boxes = group.map((each) => [each, each.getBoundingClientRect()]).filter(([, box]) => box.width && box.height);
    boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
      const inside = one.contains(other) || other.contains(one);
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (!inside && across > 1 && down > 1) found.push(`${one.outerHTML.slice(0, 80)} and ${other.outerHTML.slice(0, 80)}`);
    }));
  }
  return found;
}
"""
# Texts and plots that reach beyond their card.
_OUTSIDE = """
() => [...document.querySelectorAll(".plot text, .plot :not(defs) > path, .plot li, .plot h3, .facts dd")].filter((each) => {
  const box = each.getBoundingClientRect(), card = each.closest(".plot, .facts").getBoundingClientRect();
  return box.left < card.left - 1 || box.right > card.right + 1 || box.bottom > card.bottom + 1 || box.top < card.top - 1;
}).map((each) => each.outerHTML.slice(0, 200))
"""
# Texts whose contrast with their ground is below 4.5.
_CONTRAST = """
() => {
  const light = (colour) => {
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => linear(part / 255));
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const ground = (each) => {
    for (let one = each; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (!colour.endsWith(", 0)") && colour !== "transparent") return colour;
    }
  };
  const found = [];
  for (const each of document.querySelectorAll("h1, h2, h3, p, li, td, th, dt, dd, text, code, a, summary")) {
    const style = getComputedStyle(each);
    const ink = light(each.tagName === "text" ? style.fill : style.color), paper = light(ground(each));
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (contrast < 4.5) found.push(`${each.outerHTML.slice(0, 80)}: ${style.color} on ${ground(each)}`);
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The report of one run with everything that may happen, and one of three runs with long names."""
    folder = tmp_path_factory.mktemp("reports")
    names = ("a_run_with_a_rather_long_name_that_says_what_it_is_about", "b", "c")
    for number, name in enumerate(names):
        records: list[dict[str, Any]] = []
        for at in range(1, 301):
            loss = 3 + 8 * math.exp(-at / 40) + math.sin(at) / 10 + number / 5
            records.append(step(at, loss, grad_norm=200.0 if at == 77 else 1 + math.cos(at) / 2))
            if at % 50 == 0:
                records.append(evaluation(at, loss))
        records.insert(90, {"event": "loss_spike", "step": 77, "time": STARTED + 77, "action": "skip", "score": 31.5})
        records.insert(160, {"event": "resume", "step": 150, "checkpoint": f"runs/{name}/checkpoints/step-00000150"})
        sessions = [
            Session(STARTED, 0, 150, "SIGTERM", STARTED + 100, "4711", checkpoints=3, saving_seconds=2.0),
            Session(
                STARTED + 130, 150, 300, "finished", STARTED + 300, "4711", 1, 0, 9.0, 30.0, 3, 2.0, {"loss_spike": 1}
            ),
        ]
        config = f"run_dir: runs/{name}\ntraining: {{learning_rate: {0.001 * (1 + number)}, steps: 300}}\n"
        write_run(folder / name, records, config=config, sessions=sessions, end="{" if number else "")
    files = []
    for chosen in (names[:1], names):
        runs = read_runs([str(folder / name) for name in chosen], published_checkpoints)
        files.append(folder / f"{len(chosen)}.html")
        files[-1].write_text(render(runs), encoding="utf-8")
    return files


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_the_report_in_a_browser(browser: Any, reports: list[Path], width: int, scheme: str) -> None:
    """Prevents a page that scrolls sideways, overlaps, is unreadable in the dark, loads something or has an error."""
    for report in reports:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        messages: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message, found=messages: found.append(message.text))
        page.on("pageerror", lambda error, found=messages: found.append(str(error)))
        page.on("request", lambda request, found=requests: found.append(request.url))
        page.goto(report.as_uri())
        page.locator("details").evaluate("details => { details.open = true; }")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(_OVERLAPS) == []
        assert page.evaluate(_OUTSIDE) == []
        assert page.evaluate(_CONTRAST) == []
        sizes = page.evaluate(
            "[...document.querySelectorAll('svg text')].map((text) => text.getBoundingClientRect().height)"
        )
        assert sizes and min(sizes) > 9, "the numbers of an axis are too small to read"
        columns = page.evaluate("new Set([...document.querySelectorAll('.plot')].map((plot) => plot.offsetLeft)).size")
        assert columns == (3 if width == 1400 else 1)
        assert (messages, requests) == ([], [report.as_uri()])
        context.close()


def test_pointing_at_a_plot_shows_the_values(browser: Any, reports: list[Path]) -> None:
    """Prevents values under a plot that belong to another step than the one pointed at."""
    page = browser.new_context(viewport={"width": 1400, "height": 900}).new_page()
    page.goto(reports[0].as_uri())
    plot = page.locator(".plot", has_text="Tokens per second")
    image, last = plot.locator(".image"), plot.locator(".legend b").inner_text()
    box = image.bounding_box()
    data = page.evaluate("JSON.parse(document.getElementById('data').textContent)[0]")
    share = data["left"] + (data["right"] - data["left"]) * 77 / 300
    image.hover(position={"x": box["width"] * share, "y": box["height"] / 2})
    assert (
        plot.locator(".at").inner_text().startswith("step 77")
        and "loss_spike at 77" in plot.locator(".at").inner_text()
    )
    assert plot.locator(".legend b").inner_text() == "2,077"
    page.locator("h1").hover()
    assert (plot.locator(".at").inner_text(), plot.locator(".legend b").inner_text()) == (
        "last values",
        last,
    ) and last == "2,300"
    image.focus()
    for _ in range(2):
        page.keyboard.press("ArrowLeft")
    assert plot.locator(".legend b").inner_text() == "2,294"


def test_a_value_is_shown_with_the_step_at_which_it_was_measured(browser: Any, reports: list[Path]) -> None:
    """Prevents a plot that gives the value of an evaluation for a step that had none, also beside a run that had one."""
    runs = [
        write_run(
            reports[0].parent / "steps" / f"every_{every}",
            [evaluation(at, at / 100) for at in range(every, 301, every)],
        )
        for every in (100, 75)
    ]
    file = reports[0].parent / "steps.html"
    file.write_text(render(read_runs([str(run) for run in runs], published_checkpoints)), encoding="utf-8")
    page = browser.new_context(viewport={"width": 1400, "height": 900}).new_page()
    page.goto(file.as_uri())
    plot = page.locator(".plot", has_text="Validation loss: backbone")
    image = plot.locator(".image")
    box = image.bounding_box()
    data = page.evaluate("JSON.parse(document.getElementById('data').textContent)[0]")
    for pointed, step_shown, shown in ((297, 300, ["3", "3"]), (197, 200, ["2", "2.25 at 225"]), (40, 40, ["–", "–"])):
        share = data["left"] + (data["right"] - data["left"]) * pointed / 300
        image.hover(position={"x": box["width"] * share, "y": box["height"] / 2})
        assert plot.locator(".at").inner_text() == f"step {step_shown}"
        assert plot.locator(".legend b").all_inner_texts() == shown
        cursor = plot.locator(".cursor").bounding_box()["x"] - box["x"]
        assert abs(cursor / box["width"] - data["left"] - (data["right"] - data["left"]) * step_shown / 300) < 0.01
