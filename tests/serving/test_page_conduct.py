"""The page in a browser: keys, errors, the server's state, the run's curves, and who can use it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.checkpoint.loading import LoadedModel
from tests.serving.page_checks import PROBLEMS, TEXTS, colour_of, contrast, faint
from tests.serving.page_model import Visit, make_page_run, visit_to
from tests.serving.servers import Server, serving

NARROW = {"viewport": {"width": 320, "height": 640}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's log: 40 steps, two evaluations, a resume."""
    return make_page_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def site(page_model: LoadedModel, run: Path) -> Iterator[Server]:
    with serving(page_model, run_folder=run) as server:
        yield server
        server.wait_idle()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_and_name_what_is_there(
    site: Server, browser: Any, visits: list[Visit], scheme: str
) -> None:
    """Prevents faint texts in one of both colour schemes, controls without a name, and a broken outline."""
    visit = visit_to(visits, browser, site, color_scheme=scheme)
    page = visit.open()
    grounds = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (contrast(colour_of(grounds), (0, 0, 0)) > 10) is (scheme == "light")
    assert (page.evaluate(PROBLEMS), faint(page.evaluate(TEXTS))) == ([], [])
    visit.choose("text", "side-by-side", max_tokens=60, draft_tokens=4)
    page.locator("#show-rejected").check()
    turn = visit.send("The Congress", answers=2)
    turn.locator(".recycled").first.hover()
    page.locator("#tip").wait_for()
    assert (page.evaluate(PROBLEMS), faint(page.evaluate(TEXTS))) == ([], [])
    page.locator("#view-run").click()
    page.locator("#charts svg.chart").nth(1).wait_for()
    page.locator("#charts summary").first.click()
    page.locator("#charts td").first.wait_for()
    assert (page.evaluate(PROBLEMS), faint(page.evaluate(TEXTS))) == ([], [])


def test_nothing_is_cut_off_on_a_narrow_screen(site: Server, browser: Any, visits: list[Visit]) -> None:
    """Prevents a page that has to be scrolled sideways on a phone, or at 400 % zoom."""
    visit = visit_to(visits, browser, site, **NARROW)
    page = visit.open()
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) == 320
    assert page.locator("#temperature").is_hidden(), "settings fold away"
    page.locator("#settings summary").click()
    visit.choose("text", "side-by-side", max_tokens=60, draft_tokens=4)
    page.locator("#show-rejected").check()
    turn = visit.send("Thecongressshallconsider" * 8, answers=2)
    left, right = (answer.bounding_box() for answer in turn.locator(".answer").all())
    assert left["y"] + left["height"] <= right["y"], "answers are one below the other"
    turn.locator(".token").nth(8).hover()
    box = page.locator("#tip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 320
    assert page.evaluate(wide) == 320
    page.locator("#view-run").click()
    page.locator("#charts svg.chart").nth(1).wait_for()
    assert page.evaluate(wide) == 320


def test_the_keyboard_is_enough(site: Server, browser: Any, visits: list[Visit]) -> None:
    """Prevents a control that only a mouse reaches, a tab stop at every token, and Ctrl+Enter that does not send."""
    visit = visit_to(visits, browser, site)
    page = visit.open()
    focused = "document.activeElement.id || document.activeElement.name || document.activeElement.className"

    def tab_to(name: str, most: int = 30) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate(focused) == name:
                return
        raise AssertionError(f"{name} is not reached with {most} strokes of Tab")

    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # skips to the prompt
    assert page.evaluate(focused) == "prompt"
    page.keyboard.type("The Congress")
    page.keyboard.press("Control+Enter")
    page.locator(".answer[data-state=done]").nth(1).wait_for()
    page.evaluate("document.activeElement.blur()")
    for name in ("kind", "mode", "temperature", "max-tokens", "seed", "show-rejected"):
        tab_to(name)
    page.keyboard.press("Space")
    assert page.locator("#show-rejected").is_checked()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.answer').dataset.mode") == "autoregressive"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.answer').dataset.mode") == "verified"
    tab_to("prompt", 2)


def test_a_screen_reader_hears_the_start_and_the_end(site: Server, browser: Any, visits: list[Visit]) -> None:
    """Prevents a live region that reads every token, or an end that nobody hears of."""
    visit = visit_to(visits, browser, site)
    page = visit.open()
    page.evaluate("""() => {
      window.heard = [];
      const hear = list => list.forEach(one => window.heard.push(one.target.textContent));
      for (const region of document.querySelectorAll('[aria-live], [role=status], [role=alert]')) {
        new MutationObserver(hear).observe(region, {childList: true, subtree: true, characterData: true});
      }
    }""")
    visit.choose("text", "side-by-side", max_tokens=80)
    turn = visit.send("The Congress", answers=2)
    heard = page.evaluate("window.heard")
    assert len(heard) == 2
    assert heard[0] == "Answering, autoregressive and verified"
    assert "verified: token limit reached, 80 tokens" in heard[1] and "Identical: 80 tokens" in heard[1]
    assert turn.locator("[aria-live]").count() == 0
    assert turn.locator(".answer[aria-busy=false]").count() == 2


def test_motion_is_reduced_on_request(site: Server, browser: Any, visits: list[Visit]) -> None:
    """Prevents blinking and sliding for users who asked their system for less motion."""
    visit = visit_to(visits, browser, site, reduced_motion="reduce")
    page = visit.open()
    visit.choose("text", "verified", max_tokens=20)
    bar = visit.send("The Congress").locator(".rate-bar span")
    assert bar.evaluate("bar => getComputedStyle(bar).transitionProperty") == "none"
    caret = """answer => {
      answer.dataset.state = 'streaming';
      return getComputedStyle(answer.querySelector('.text'), '::after').animationName;
    }"""
    assert page.locator(".answer").evaluate(caret) == "none"


def test_curves_of_the_run(site: Server, browser: Any, visits: list[Visit]) -> None:
    """Prevents curves without axes, legend or text, with values of another curve, or that hide an interrupted run."""
    visit = visit_to(visits, browser, site)
    page = visit.open()
    page.locator("#view-run").click()
    loss, acceptance = (page.locator("#charts figure").nth(number) for number in range(2))
    loss.locator("svg.chart").wait_for()
    assert loss.locator("li").all_inner_texts() == [
        "backbone",
        "recycle, depth 1",
        "recycle, depth 2",
        "backbone, validation",
    ]
    assert acceptance.locator("li").all_inner_texts() == ["draft 1", "draft 2"]
    assert loss.locator("svg.chart path.curve").count() == 3
    assert loss.locator("svg.chart circle").count() == 2
    assert loss.locator("svg.chart .resumed").count() == 1
    assert {"0", "10", "40", "step"} <= set(loss.locator("svg.chart text").all_text_contents())
    assert {"0 %", "100 %"} <= set(acceptance.locator("svg.chart text").all_text_contents())
    assert "backbone: from 6.000 at step 1 to 2.100 at step 40" in loss.locator("svg.chart").get_attribute("aria-label")
    assert "draft 2: from 25 % at step 20 to 50 % at step 40" in acceptance.locator("svg.chart").get_attribute(
        "aria-label"
    )
    points = loss.locator("svg.chart path.curve-0").get_attribute("d").replace("M", "L").split("L")[1:]
    heights = [float(point.split()[1]) for point in points]
    assert len(heights) == 40 and heights == sorted(heights), "a falling loss is drawn downwards"
    acceptance.locator("summary").click()
    row = acceptance.locator("tbody tr").last
    assert [row.locator("th").inner_text(), *row.locator("td").all_inner_texts()] == ["40", "80 %", "50 %"]
    box = loss.locator("svg.chart").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 17, box["y"] + 100)
    assert loss.locator(".readout").inner_text().startswith("step 40 \u00b7 backbone 2.100")
    page.locator("#view-decode").click()
    assert page.locator("#decode").is_visible() and page.locator("#run").is_hidden()


def test_a_model_without_a_run_or_template_offers_neither(
    tmp_path: Path, browser: Any, visits: list[Visit], page_model: LoadedModel
) -> None:
    """Prevents views and choices that can only fail."""
    from dataclasses import replace

    from recycle_ds.data.tokenizer import Tokenizer

    page_model.tokenizer.save(tmp_path)
    with serving(replace(page_model, tokenizer=Tokenizer.load(tmp_path))) as server:
        page = visit_to(visits, browser, server).open()
        assert page.locator("#views").is_hidden()
        assert page.locator("#kind").is_hidden() and page.locator("#system-row").is_hidden()
        assert page.locator("#prompt-label").inner_text() == "Prompt"


def test_a_key_is_asked_for_and_kept_for_the_tab_only(
    page_model: LoadedModel, run: Path, browser: Any, visits: list[Visit]
) -> None:
    """Prevents a page that is useless with keys, or that leaves them on the machine."""
    with serving(page_model, api_keys=("sesame",), run_folder=run) as server:
        visit = visit_to(visits, browser, server)
        visit.allowed = 1
        page = visit.open("#key-form:not([hidden])")
        assert page.locator("#notice").inner_text() == "This server asks for an API key."
        assert page.locator("#send").is_disabled()
        for key in ("wrong", "sesame"):
            page.locator("#key").fill(key)
            page.keyboard.press("Enter")
            page.locator("#key-form:not([hidden])" if key == "wrong" else "#send:enabled").wait_for()
        assert page.locator("#key-form").is_hidden() and page.locator("#notice").is_hidden()
        visit.choose("text", "verified", max_tokens=8)
        visit.send("The Congress")
        page.locator("#view-run").click()
        page.locator("#charts svg.chart").first.wait_for()
        kept = page.evaluate(
            "[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie, location.href]"
        )
        assert ["sesame" in place for place in kept] == [True, False, False, False]
        page.reload()
        page.locator("#send:enabled").wait_for()
        other = visit_to(visits, browser, server)
        other.allowed = 1
        other.open("#key-form:not([hidden])")
        server.wait_idle()


def test_the_servers_state_is_shown(page_model: LoadedModel, browser: Any, visits: list[Visit]) -> None:
    """Prevents a page that stays useless after the model is loaded, or is silent while the server drains."""
    with serving(page_model) as server:
        model, server.state.model = server.state.model, None
        visit = visit_to(visits, browser, server)
        visit.allowed = 1
        page = visit.open("#state[data-state=loading]")
        assert page.locator("#state").inner_text() == "loading the model"
        assert page.locator("#send").is_disabled()
        server.state.model = model
        page.locator("#state[data-state=ready]").wait_for()
        page.locator("#send:enabled").wait_for()
        server.state.draining = True
        visit.choose("text", "verified")
        visit.send("The Congress", state="failed")
        page.locator("#state[data-state=draining]").wait_for()
        assert page.locator("#state").inner_text() == "shutting down: takes no new prompts"
        notice = page.locator("#notice").inner_text()
        assert notice.startswith("The server takes no requests at the moment.") and "Try again in" in notice
        server.state.draining = False
        page.locator("#state[data-state=ready]").wait_for()
        assert page.locator("input[name=mode][value=verified]").is_checked(), "the settings are kept"
        visit.choose(max_tokens=8)
        visit.send("The Congress")
        assert page.locator("#notice").is_hidden()
        server.wait_idle()


def test_errors_are_shown_in_words(page_model: LoadedModel, browser: Any, visits: list[Visit]) -> None:
    """Prevents a prompt that is lost with its error, an error that nobody reads, and raw exceptions on the page."""
    with serving(page_model, max_prompt_tokens=20) as server:
        visit = visit_to(visits, browser, server)
        visit.allowed = 1
        page = visit.open()
        visit.choose("chat", "verified", max_tokens=8)
        prompt = "The Congress shall consider " * 20
        visit.send(prompt, state="failed")
        notice = page.locator("#notice").inner_text()
        assert "20" in notice and "token" in notice and "{" not in notice
        assert page.locator("#prompt").input_value() == prompt
        page.locator("#max-tokens").fill("0")
        page.locator("#send").click()
        assert page.evaluate("document.activeElement.id") == "max-tokens", "a field out of range gets the focus"
        assert page.locator(".turn").count() == 1
        page.locator("#max-tokens").fill("8")
        server.wait_idle()
    visit.send("The Congress", state="failed")
    assert page.locator("#notice").inner_text() == "The server cannot be reached. Is it still running?"
    page.locator("#state[data-state=unreachable]").wait_for()


def test_contrast_is_that_of_wcag() -> None:
    """Prevents a measure of contrast that finds every text readable."""
    assert math.isclose(contrast((0, 0, 0), (255, 255, 255)), 21)
    assert math.isclose(contrast((118, 118, 118), (255, 255, 255)), 4.54, abs_tol=0.01)
    assert faint([["x", "rgb(150, 150, 150)", ["rgba(0, 0, 0, 0)", "rgb(255, 255, 255)"]]])
