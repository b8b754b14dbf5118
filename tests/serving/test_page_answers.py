"""The page in a browser: what it shows of answers is what the server sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from recycle_ds.checkpoint.loading import LoadedModel
from tests.serving.page_model import Visit, shown
from tests.serving.servers import Server, serving

PROMPT = "Hello, what"
MARKS = "text => [...text.querySelectorAll('.token')].map(token => token.classList.contains('recycled'))"


@pytest.fixture(scope="module")
def site(page_model: LoadedModel) -> Iterator[Server]:
    with serving(page_model) as server:
        yield server
        server.wait_idle()


@pytest.fixture
def visit(browser: Any, site: Server) -> Iterator[Visit]:
    made = Visit(browser, site.url)
    made.open()
    yield made
    made.check()
    made.close()


def ask(site: Server, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    """The API's own answer, not streamed."""
    with site.http() as http:
        answer = http.post(path, json={"temperature": 0, "token_details": True, **body})
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("mode", ["verified", "autoregressive", "alternate"])
def test_an_answer_is_the_apis(site: Server, visit: Visit, mode: str) -> None:
    """Prevents a page that loses, repeats or alters text, marks other tokens than the recycled ones, or other figures."""
    answer = ask(
        site, prompt=PROMPT, max_tokens=90, mode=mode, **({} if mode == "autoregressive" else {"draft_tokens": 4})
    )
    choice, recycle = answer["choices"][0], answer["usage"]["recycle"]
    visit.choose("text", mode, max_tokens=90)
    if mode != "autoregressive":
        visit.choose(draft_tokens=4)
    seen = visit.send(PROMPT).locator(".answer")
    assert shown(seen) == choice["text"]
    visible = [token for token in choice["tokens"] if token["text"]]
    recycled = [token["source"] == "recycled" for token in visible]
    assert seen.locator(".text").evaluate(MARKS) == recycled
    assert any(recycled) is (mode != "autoregressive")
    assert seen.locator(".answer-state").inner_text() == "token limit reached"
    figures = dict(zip(seen.locator("dt").all_inner_texts(), seen.locator("dd").all_inner_texts(), strict=True))
    assert figures["tokens per full call"] == f"{recycle['tokens_per_full_call']:.2f}"
    assert figures["tokens"] == "90"
    share = sum(token["source"] == "recycled" for token in choice["tokens"]) / 90
    assert figures["recycled"] == f"{100 * share:.0f} %"
    assert float(seen.locator(".rate-number").inner_text().replace(",", "")) > 0
    bars = [f"{100 * rate:.0f} %" for rate in recycle["acceptance"]]
    assert seen.locator(".bar-value").all_inner_texts() == bars
    assert bool(bars) is (mode == "verified")


def test_recycled_tokens_differ_by_more_than_their_colour(visit: Visit) -> None:
    """Prevents marks that somebody who sees no colours cannot see."""
    visit.choose("text", "verified", max_tokens=40, draft_tokens=4)
    turn = visit.send(PROMPT)
    style = "mark => [getComputedStyle(mark).textDecorationLine, getComputedStyle(mark).color]"
    recycled = turn.locator(".recycled .mark").first.evaluate(style)
    full = turn.locator(".token:not(.recycled) .mark").first.evaluate(style)
    assert (recycled[0], full[0]) == ("underline", "none")
    assert recycled[1] != full[1]


@pytest.mark.parametrize("at_once", [False, True])
def test_side_by_side(site: Server, visit: Visit, at_once: bool) -> None:
    """Prevents a comparison of different prompts or settings, and a wrong verdict on identical texts."""
    visit.choose("text", "side-by-side", max_tokens=120, draft_tokens=4)
    visit.page.locator("#at-once").set_checked(at_once)
    turn = visit.send(PROMPT, answers=2)
    left, right = turn.locator(".answer").all()
    expected = ask(site, prompt=PROMPT, max_tokens=120, mode="autoregressive")["choices"][0]
    assert shown(left) == shown(right) == expected["text"]
    assert left.get_attribute("data-mode") == "autoregressive"
    assert right.get_attribute("data-mode") == "verified"
    assert left.locator(".recycled").count() == 0 < right.locator(".recycled").count()
    verdict = turn.locator(".verdict").inner_text()
    assert "Identical: 120 tokens" in verdict
    assert "\u00d7 the speed of autoregressive" in verdict
    assert turn.locator(".differs").count() == 0
    first, second = visit.bodies("v1/completions")
    assert (first.pop("mode"), second.pop("mode")) == ("autoregressive", "verified")
    assert second.pop("draft_tokens") == 4
    assert first == second
    assert first["prompt"] == PROMPT


def test_texts_that_differ_are_not_called_identical(visit: Visit) -> None:
    """Prevents a verdict that does not look at the texts: two samples without a seed differ, with one they do not."""
    visit.choose("text", "side-by-side", max_tokens=100, temperature=2)
    assert visit.page.locator("#seed-hint").is_visible()
    turn = visit.send(PROMPT, answers=2)
    verdict = turn.locator(".verdict").inner_text()
    assert "They differ from token" in verdict and "set a seed" in verdict
    assert turn.locator(".differs").count() == 2
    visit.choose(seed=7)
    assert not visit.page.locator("#seed-hint").is_visible()
    turn = visit.send(PROMPT, answers=2)
    assert "Identical: 100 tokens" in turn.locator(".verdict").inner_text()
    assert visit.bodies("v1/completions")[-1]["seed"] == 7


def test_a_token_shows_its_probability_and_source(site: Server, visit: Visit) -> None:
    """Prevents a tip with the figures of another token, or one that only a mouse reaches."""
    choice = ask(site, prompt=PROMPT, max_tokens=60, mode="verified", draft_tokens=4)["choices"][0]
    visible = [token for token in choice["tokens"] if token["text"]]
    visit.choose("text", "verified", max_tokens=60, draft_tokens=4)
    tokens = visit.send(PROMPT).locator(".token")
    tip = visit.page.locator("#tip")
    words = {"recycled": "confirmed by the full model", "full": "Full model"}
    for number in (next(i for i, token in enumerate(visible) if token["source"] == source) for source in words):
        tokens.nth(number).hover()
        tip.locator(f"text=id {visible[number]['id']}").wait_for()
        text = tip.inner_text()
        assert words[visible[number]["source"]] in text
        assert f"log {visible[number]['logprob']:.3f}".replace("-0.000", "0.000") in text.replace("-0.000", "0.000")
        assert tokens.nth(number).get_attribute("aria-describedby") == "tip"
    visit.page.mouse.move(2, 2)
    tip.wait_for(state="hidden")
    tokens.first.focus()
    for number in (1, 2):
        visit.page.keyboard.press("ArrowRight")
        tip.locator(f"text=id {visible[number]['id']}").wait_for()
    visit.page.keyboard.press("End")
    tip.locator(f"text=id {visible[-1]['id']}").wait_for()
    visit.page.keyboard.press("Escape")
    tip.wait_for(state="hidden")


def test_rejected_drafts_are_shown_on_demand(site: Server, visit: Visit) -> None:
    """Prevents rejected drafts that clutter the text unasked, are missing, or stand in another place."""
    choice = ask(site, prompt=PROMPT, max_tokens=90, mode="verified", draft_tokens=4)["choices"][0]
    rejected = [draft["text"] for token in choice["tokens"] for draft in token["rejected"]]
    assert rejected
    visit.choose("text", "verified", max_tokens=90, draft_tokens=4)
    turn = visit.send(PROMPT)
    marks = turn.locator("del.rejected")
    assert marks.count() == len(rejected)
    assert not marks.first.is_visible()
    assert turn.locator(".text").inner_text().strip() == choice["text"].strip()
    visit.page.locator("#show-rejected").check()
    assert marks.first.is_visible()
    assert marks.first.evaluate("mark => getComputedStyle(mark).textDecorationLine") == "line-through"
    found = marks.all_inner_texts()
    assert [mark for mark, text in zip(found, rejected, strict=True) if mark != text.strip() and text.strip()] == []
    visit.page.locator("#show-rejected").uncheck()
    assert not marks.first.is_visible()


def test_what_the_model_and_the_user_write_stays_text(visit: Visit) -> None:
    """Prevents a prompt or an answer from running scripts in the page."""
    prompt = "<img src=x onerror=alert(3)><script>alert(4)</script><b>The Congress"
    visit.choose("text", "side-by-side", max_tokens=120)
    visit.page.locator("#show-rejected").check()
    turn = visit.send(prompt, answers=2)
    assert turn.locator(".prompt-text").inner_text() == prompt
    text = shown(turn.locator(".answer").last)
    assert "<script>" in text or "<img src=" in text
    turn.locator(".token").nth(4).hover()
    assert visit.page.locator("#turns :is(script, img, b), #tip :is(script, img)").count() == 0


def test_a_chat_of_several_turns(site: Server, visit: Visit) -> None:
    """Prevents turns that the model does not see, or sees under another role."""
    visit.choose("chat", "side-by-side", max_tokens=30)
    visit.choose(system="Be brief.")
    first = shown(visit.send("The Congress", answers=2).locator(".answer").last)
    second = shown(visit.send("And the Union?", answers=2).locator(".answer").last)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The Congress"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And the Union?"},
    ]
    assert [body["messages"] for body in visit.bodies("v1/chat/completions")] == [messages[:2]] * 2 + [messages] * 2
    expected = ask(site, "/v1/chat/completions", messages=messages, max_tokens=30, mode="autoregressive")
    assert second == expected["choices"][0]["message"]["content"]
    visit.page.locator("#clear").click()
    assert visit.page.locator(".turn").count() == 0
    visit.send("The Congress", answers=2)
    assert visit.bodies("v1/chat/completions")[-1]["messages"] == messages[:2]


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop(site: Server, visit: Visit, way: str) -> None:
    """Prevents a stop that only hides the stream: the server goes on decoding, or the next mode starts."""
    visit.choose("text", "side-by-side", max_tokens=4000)
    page = visit.page
    page.locator("#prompt").fill("The Congress")
    page.locator("#send").click()
    page.locator(".answer[data-state=streaming] .token").first.wait_for()
    if way == "button":
        page.locator("#stop").click()
    else:
        page.keyboard.press("Escape")
    page.locator(".answer[data-state=stopped]").nth(1).wait_for()
    site.wait_idle()
    assert 0 < page.locator(".answer").first.locator(".token").count() < 4000
    assert len(visit.bodies("v1/completions")) == 1
    assert page.locator("#notice").is_hidden()
    assert page.locator("#send").is_enabled() and page.locator("#stop").is_disabled()
