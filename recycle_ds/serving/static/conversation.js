// Prompts and answers: which requests a prompt makes, in which order, and what is said about two answers side by side.

import { Answer, compare } from "./answer.js";
import { $, announce, make, number } from "./dom.js";

const NEAR = 0.25; // nats between two tokens that rounding can swap: two steps of a bf16 logit from 16 to 32

export class Conversation {
  constructor(onChange) {
    this._onChange = onChange;
    this._history = []; // chat messages that a next turn continues
    this._abort = null;
    this._following = false;
    const upwards = (event) => {
      if (event.deltaY < 0 || ["PageUp", "ArrowUp", "Home"].includes(event.key)) this._following = false;
    };
    document.addEventListener("wheel", upwards, { passive: true });
    document.addEventListener("keydown", upwards);
    document.addEventListener("touchmove", () => (this._following = false), { passive: true });
  }

  get running() {
    return this._abort !== null;
  }

  get empty() {
    return $("turns").children.length === 0;
  }

  stop() {
    this._abort?.abort();
  }

  clear() {
    this.stop();
    this._history = [];
    $("turns").replaceChildren();
    this._onChange();
  }

  // Starts a prompt in every mode of `settings.modes`. Throws the first ServerError; what was received stays visible.
  async send(prompt, settings) {
    this._abort = new AbortController();
    const answers = settings.modes.map((mode) => new Answer(mode));
    const turn = this._addTurn(prompt, answers, settings);
    const { path, body } = this._request(prompt, settings);
    const one = (answer) => answer.run(path, body, this._abort.signal, () => this._update(turn, answers, settings));
    this._onChange();
    announce(`Answering, ${settings.modes.join(" and ")}`);
    try {
      if (settings.atOnce) {
        const results = await Promise.allSettled(answers.map(one));
        const failed = results.find((result) => result.status === "rejected");
        if (failed) throw failed.reason;
      } else {
        for (const answer of answers) {
          if (this._abort.signal.aborted) answer.skip();
          else await one(answer);
        }
      }
    } finally {
      answers.filter((answer) => !answer.ended).forEach((answer) => answer.skip());
      this._update(turn, answers, settings);
      this._abort = null;
      const last = answers.at(-1).tokens.text || answers[0].tokens.text;
      if (settings.chat && last && turn.isConnected) {
        this._history.push({ role: "user", content: prompt }, { role: "assistant", content: last });
      }
      announce(summary(answers, turn));
      this._onChange();
    }
  }

  _request(prompt, settings) {
    const body = {
      model: settings.model,
      max_tokens: settings.maxTokens,
      temperature: settings.temperature,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
      token_details: true,
    };
    if (settings.seed !== null) body.seed = settings.seed;
    if (settings.draftTokens !== null) body.draft_tokens = settings.draftTokens;
    if (!settings.chat) return { path: "v1/completions", body: { ...body, prompt } };
    const system = settings.system ? [{ role: "system", content: settings.system }] : [];
    const messages = [...system, ...this._history, { role: "user", content: prompt }];
    return { path: "v1/chat/completions", body: { ...body, messages } };
  }

  _addTurn(prompt, answers, settings) {
    const verdict = make("p", { class: "verdict", hidden: answers.length < 2 });
    const turn = make(
      "li",
      { class: "turn" },
      make("div", { class: "asked" }, make("h2", {}, settings.chat ? "You" : "Prompt"), make("p", { class: "prompt-text" }, prompt)),
      verdict,
      make("div", { class: answers.length > 1 ? "answers two" : "answers" }, ...answers.map((answer) => answer.element)),
    );
    $("turns").append(turn);
    this._following = true;
    this._follow(turn);
    return turn;
  }

  _update(turn, answers, settings) {
    const speeds = answers.map((answer) => answer.speed).filter(Number.isFinite);
    answers.forEach((answer) => answer.scale(Math.max(0, ...speeds)));
    if (answers.length === 2) this._judge(turn, answers, settings);
    this._follow(turn);
  }

  // Keeps the end of the newest turn in view while it grows, but its beginning too; not after the reader has scrolled up
  _follow(turn) {
    if (!this._following) return;
    const box = turn.getBoundingClientRect();
    const composer = document.querySelector(".composer").getBoundingClientRect();
    const over = box.bottom - Math.min(composer.top, window.innerHeight);
    const way = Math.min(over, box.top - 12);
    if (way > 1) window.scrollBy(0, way);
  }

  _judge(turn, [left, right], settings) {
    const verdict = turn.querySelector(".verdict");
    if (!left.tokens.ids.length || !right.tokens.ids.length) {
      verdict.textContent = "Same prompt, same settings";
      verdict.hidden = right.ended; // nothing to compare
      return;
    }
    const found = compare(left, right);
    const parts = [make("strong", { class: found.same ? "same" : "other" }, `${found.same ? "=" : "≠"} ${found.text}`)];
    if (left.ended && right.ended && left.speed > 0 && right.speed > 0) {
      parts.push(make("span", {}, make("strong", {}, `${number(right.speed / left.speed, 2)}×`), ` the speed of ${left.mode}`));
    }
    if (!found.same) {
      if (!turn.querySelector(".differs")) [left, right].forEach((answer) => answer.tokens.differs(found.at));
      parts.push(make("span", { class: "soft" }, why(left, right, found.at, settings)));
    }
    verdict.replaceChildren(...parts);
    verdict.dataset.same = String(found.same);
  }
}

function why(left, right, at, settings) {
  if (settings.temperature > 0 && settings.seed === null) return "two samples of the same distribution: set a seed to get the same text twice";
  const [a, b] = [left, right].map((answer) => answer.tokens.logprobs[at]);
  if (settings.temperature > 0 || !Number.isFinite(a) || !Number.isFinite(b)) return "in bf16, rounding can decide between two tokens";
  const both = `log probabilities ${number(a, 3)} and ${number(b, 3)}`;
  return Math.abs(a - b) < NEAR ? `a near tie, which rounding in bf16 can decide: ${both}` : both;
}

function summary(answers, turn) {
  const each = answers.map((answer) => `${answer.mode}: ${answer.status.textContent}, ${answer.tokens.ids.length} tokens, ${number(answer.speed)} tokens per second`);
  const verdict = turn.querySelector(".verdict");
  return [...each, verdict.hidden ? "" : [...verdict.children].map((part) => part.textContent.replace(/^[=≠] /, "")).join(", ")].filter(Boolean).join(". ");
}
