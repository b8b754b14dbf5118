// One answer: its mode, figures that follow the stream, its text, and acceptance by draft position.

import { call, events } from "./api.js";
import { counted, make, number, percent } from "./dom.js";
import { TokenText } from "./tokens.js";

const ENDS = { stop: "complete", length: "token limit reached" };

export class Answer {
  constructor(mode) {
    this.mode = mode;
    this.usage = null;
    this.state = "waiting"; // waiting, reading, streaming, done, stopped, failed
    this.finish = null;
    this.tokens = new TokenText(`Text, ${mode}`);
    this._queue = [];
    this._frame = 0;
    this._build();
    this._show();
  }

  get speed() {
    return this.usage?.recycle?.tokens_per_second || NaN;
  }

  get ended() {
    return ["done", "stopped", "failed"].includes(this.state);
  }

  // Streams the answer. request: a body without mode, path: where it is posted to. Throws ServerError; an abort is no error.
  async run(path, request, signal, onChange) {
    const body = { ...request, mode: this.mode };
    if (this.mode === "autoregressive") delete body.draft_tokens;
    this._onChange = onChange;
    this._set("reading");
    try {
      const response = await call(path, { body, signal });
      for await (const event of events(response)) this._take(event);
      this._flush();
      this._set("done");
    } catch (error) {
      this._flush();
      this._set(error.name === "AbortError" ? "stopped" : "failed");
      if (error.name !== "AbortError") throw error;
    }
  }

  // Sets the length of the speed's bar. most: the highest speed beside it
  scale(most) {
    this.bar.firstChild.style.width = Number.isFinite(this.speed) && most > 0 ? `${(100 * this.speed) / most}%` : "0";
  }

  skip() {
    this._set("stopped");
  }

  _take(event) {
    if (event.usage) this.usage = event.usage;
    for (const choice of event.choices ?? []) {
      this._queue.push(...(choice.tokens ?? []));
      if (choice.finish_reason) this.finish = choice.finish_reason;
    }
    if (!this._frame) this._frame = requestAnimationFrame(() => this._flush());
  }

  // Once a frame at most, however fast tokens arrive
  _flush() {
    cancelAnimationFrame(this._frame);
    this._frame = 0;
    if (this._queue.length) {
      this.state = "streaming";
      this.tokens.append(this._queue.splice(0), this.mode !== "alternate");
    }
    this._show();
    this._onChange?.();
  }

  _set(state) {
    this.state = state;
    this._show();
    this._onChange?.();
  }

  _build() {
    this.status = make("span", { class: "answer-state soft" });
    this.rate = make("span", { class: "rate-number" });
    this.bar = make("span", { class: "rate-bar", "aria-hidden": "true" }, make("span", {}));
    this.figures = make("dl", { class: "figures" });
    this.bars = make("ol", { class: "bars" });
    this.acceptance = make("div", { class: "acceptance", hidden: true }, make("h4", {}, "Acceptance by draft position"), this.bars);
    this.element = make(
      "section",
      { class: "answer", "aria-label": `Answer, ${this.mode}`, "data-mode": this.mode },
      make("header", {}, make("h3", {}, this.mode), this.status),
      make("p", { class: "rate" }, this.rate, make("span", { class: "soft" }, " tokens/s")),
      this.bar,
      this.figures,
      this.tokens.element,
      this.acceptance,
    );
  }

  _show() {
    const { state, usage, tokens } = this;
    this.element.dataset.state = state;
    this.element.setAttribute("aria-busy", String(state === "reading" || state === "streaming"));
    const words = { waiting: "waits for its turn", reading: "reading the prompt", streaming: "streaming", stopped: "stopped", failed: "failed" };
    this.status.textContent = words[state] ?? ENDS[this.finish] ?? this.finish ?? "complete";
    this.rate.textContent = number(this.speed);
    const recycle = usage?.recycle;
    const share = tokens.ids.length ? tokens.recycled / tokens.ids.length : NaN;
    this.figures.replaceChildren(
      figure("tokens per full call", number(recycle?.tokens_per_full_call, 2), "new tokens per call of the full model"),
      figure("recycled", percent(share), "share of the tokens that the module drafted"),
      figure("tokens", String(tokens.ids.length), "new tokens"),
      figure("to first", duration(recycle?.time_to_first_token), "time to the first token"),
    );
    const measured = recycle?.acceptance ?? [];
    const rates = measured.length || this.mode !== "verified" ? measured : tokens.acceptance;
    this.acceptance.hidden = rates.length === 0;
    while (this.bars.children.length > rates.length) this.bars.lastChild.remove();
    rates.forEach((rate, i) => this._showBar(i, rate));
  }

  _showBar(position, rate) {
    if (!this.bars.children[position]) {
      this.bars.append(
        make(
          "li",
          {},
          make("span", { class: "unseen" }, `Draft ${position + 1}: `),
          make("span", { class: "bar-value" }),
          make("span", { class: "bar", "aria-hidden": "true" }, make("span", {})),
          make("span", { class: "bar-position soft", "aria-hidden": "true" }, String(position + 1)),
        ),
      );
    }
    const item = this.bars.children[position];
    item.querySelector(".bar-value").textContent = percent(rate);
    item.querySelector(".bar span").style.height = `${100 * rate}%`;
  }
}

function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  return seconds < 1 ? `${number(1000 * seconds, 0)} ms` : `${number(seconds, 1)} s`;
}

function figure(name, value, title) {
  return make("div", { title }, make("dt", {}, name), make("dd", {}, value));
}

// What two answers on one prompt have in common, token id by token id. Returns {same: bool, text, at: first difference or null}.
export function compare(left, right) {
  const [a, b] = [left.tokens.ids, right.tokens.ids];
  let common = 0;
  while (common < a.length && common < b.length && a[common] === b[common]) common += 1;
  const complete = left.state === "done" && right.state === "done";
  if (complete ? common === a.length && common === b.length : common === Math.min(a.length, b.length)) {
    return { same: true, complete, at: null, text: complete ? `Identical: ${counted(common, "token")}` : `Identical so far: ${counted(common, "token")}` };
  }
  return { same: false, complete, at: common, text: `They differ from token ${common + 1} on` };
}
