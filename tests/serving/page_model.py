"""What the browser tests share: a model whose text is HTML, a run's log, and a page that is being watched."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.data.tokenizer import Tokenizer
from tests.serving.servers import Server
from tests.unit.inference.models import overfitted_model

# What the model has learnt by heart: HTML that must stay text, and characters of several tokens.
TEXT = (
    "The Congress shall consider the state of the Union, and <script>alert(1)</script> such measures as it judges "
    "<img src=x onerror=alert(2)> necessary.\n\nG\u00fcte \u65e5\u672c \U0001f389 are characters of several tokens; "
)
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
ENDED = ("done", "stopped", "failed")


def make_page_model(folder: Path, *, chat: bool = True) -> LoadedModel:
    """A model that continues TEXT, not always as its module expects, and its tokenizer's files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer.train(iter([TEXT]), 360).save(folder)
    if chat:
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(TEXT)
    model = overfitted_model(ids, tokenizer.vocab_size, steps=50, stride=4, max_positions=4096)
    model.unnamed_ids = ()
    return LoadedModel(model, tokenizer, folder, step=1, seq_length=48)


def make_page_run(folder: Path) -> Path:
    """A run's log in `folder`: 40 steps, two evaluations, a resume."""
    records: list[dict[str, Any]] = []
    for step in range(1, 41):
        loss = 2 + 4 / step
        records.append(
            {"step": step, "loss": 2 * loss, "backbone_loss": loss, "recycle_loss": [loss + 0.1, loss + 0.2]}
        )
        if step % 20 == 0:
            records.append({"step": step, "eval_loss": loss + 0.05, "eval_acceptance": [step / 50, step / 80]})
        if step == 30:
            records.append({"event": "resume", "step": 30, "checkpoint": "step-30"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 41, "lo')
    return folder


class Visit:
    """A page in a browser of its own, from its first request on. `check` is called at the end of every test."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.url = url.rstrip("/") + "/"
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.messages: list[str] = []
        self.requests: list[Any] = []
        self.allowed = 0
        """Failed requests that a test provokes: the browser reports each on its console."""
        self.page.on("console", lambda message: self.messages.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.messages.append(f"exception: {error}"))
        self.page.on("dialog", lambda dialog: self.messages.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.requests.append(request))

    def open(self, wait: str = "#send:enabled") -> Any:
        """Opens the page and waits until it can send."""
        self.page.goto(self.url)
        self.page.locator(wait).wait_for(state="attached")
        return self.page

    def choose(self, kind: str | None = None, mode: str | None = None, **fields: Any) -> None:
        """Sets settings by name. fields: id with `_` for `-`, and value."""
        for name, value in (("kind", kind), ("mode", mode)):
            if value is not None:
                self.page.locator(f"input[name={name}][value={value}]").check()
        for name, value in fields.items():
            self.page.locator("#" + name.replace("_", "-")).fill(str(value))

    def send(self, prompt: str, *, answers: int = 1, state: str = "done") -> Any:
        """Sends a prompt and waits for its answers; returns the turn."""
        self.page.locator("#prompt").fill(prompt)
        self.page.locator("#send").click()
        turn = self.page.locator(".turn").last
        for number in range(answers):
            turn.locator(f".answer[data-state={state}]").nth(number).wait_for()
        self.page.locator("#decode[data-running=false]").wait_for()
        return turn

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """What was posted to a path."""
        posted = [one for one in self.requests if one.url == self.url + path and one.method == "POST"]
        return [json.loads(one.post_data) for one in posted]

    def check(self) -> None:
        """No error on the console, no dialog, no request to another server."""
        refused = re.compile("error: Failed to load resource: the server responded with a status of|net::ERR")
        others = [message for message in self.messages if not (self.allowed and refused.search(message))]
        assert others == []
        assert [one.url for one in self.requests if not one.url.startswith(self.url)] == []

    def close(self) -> None:
        """Closes the page."""
        self.context.close()


def visit_to(visits: list[Visit], browser: Any, server: Server, **options: Any) -> Visit:
    """A visit that is checked and closed at the end of the test."""
    visits.append(Visit(browser, server.url, **options))
    return visits[-1]


def shown(answer: Any) -> str:
    """The text of an answer without rejected drafts."""
    found: str = answer.locator(".text").evaluate(
        "text => [...text.querySelectorAll('.token')].map(token => token.textContent).join('')"
    )
    return found
