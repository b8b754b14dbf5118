// The text of an answer, a span for each token, and the tip that shows a token's probability and source.

import { $, make, number, percent } from "./dom.js";

const details = new WeakMap(); // span -> what the tip shows

// Arrow keys move through the tokens. One token of a text is in the tab order, so that Tab leaves the text with one stroke.
export class TokenText {
  constructor(label) {
    this.ids = [];
    this.logprobs = [];
    this.spans = []; // of each token id; null for tokens without a text of their own
    this.recycled = 0;
    this.text = "";
    this._hidden = []; // tokens since the last visible one: parts of one character
    this._current = null; // the span in the tab order
    this._run = 0; // recycled tokens since the last one of the full model
    this._judged = []; // by draft position: [accepted, judged]
    this.element = make("div", { class: "text", role: "group", "aria-label": label });
    this.element.addEventListener("keydown", (event) => this._move(event));
    this.element.addEventListener("focusin", (event) => this._enter(event.target));
  }

  // tokens: as in a choice's "tokens"; verified: false for tokens that were kept without a check
  append(tokens, verified) {
    const added = document.createDocumentFragment();
    for (const token of tokens) {
      this.ids.push(token.id);
      this.logprobs.push(token.logprob);
      this.text += token.text;
      this._judge(token);
      for (const draft of token.rejected ?? []) {
        added.append(make("del", { class: "rejected" }, readable(draft.text)));
      }
      if (token.text === "") {
        this._hidden.push(token);
        this.spans.push(null);
      } else {
        added.append(this._span(token, verified));
      }
    }
    this.element.append(added);
  }

  // Acceptance by draft position so far, as the server counts it for complete answers: given that all earlier drafts were accepted
  get acceptance() {
    return this._judged.map(([accepted, judged]) => accepted / judged);
  }

  // Marks the first token in which another answer differs
  differs(index) {
    const span = this.spans[index] ?? this.spans.slice(index).find(Boolean);
    span?.classList.add("differs");
  }

  _judge(token) {
    if (token.source === "recycled") {
      this.recycled += 1;
      this._count(this._run, true);
      this._run += 1;
    } else {
      if (token.rejected?.length) this._count(this._run, false);
      this._run = 0;
    }
  }

  _count(position, accepted) {
    const place = (this._judged[position] ??= [0, 0]);
    place[0] += accepted ? 1 : 0;
    place[1] += 1;
  }

  _span(token, verified) {
    // The blank before a word is not marked: marks of neighbours stay apart. The first one of an answer is not shown.
    const [, blank, rest] = /^( ?)([^]*)$/.exec(token.text);
    const apart = blank && rest ? blank : "";
    const first = this._current === null;
    const classes = ["token"];
    if (token.source === "recycled") classes.push("recycled");
    if (/^\n+$/.test(token.text)) classes.push("newline");
    const span = make(
      "span",
      { class: classes.join(" "), tabindex: first ? "0" : "-1" },
      first ? make("span", { class: "lead" }, apart) : apart,
      make("span", { class: "mark" }, apart ? rest : token.text),
    );
    if (first) this._current = span;
    details.set(span, { ...token, verified, parts: this._hidden.length + 1 });
    this._hidden = [];
    this.spans.push(span);
    return span;
  }

  _move(event) {
    const all = this.spans.filter(Boolean);
    const at = all.indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    if (!all[to]) return;
    all[to].focus();
  }

  _enter(span) {
    if (!details.has(span)) return;
    this._current.tabIndex = -1;
    span.tabIndex = 0;
    this._current = span;
  }
}

// One tip for the page. It can be hovered over, Escape hides it, and it stays while its token has the focus.
export function installTip() {
  let shown = null;
  let timer = 0;
  const tip = $("tip");
  const hide = () => {
    shown?.removeAttribute("aria-describedby");
    shown = null;
    tip.hidden = true;
  };
  const show = (span) => {
    clearTimeout(timer);
    if (span === shown) return;
    hide();
    shown = span;
    tip.replaceChildren(...lines(details.get(span)));
    tip.hidden = false;
    span.setAttribute("aria-describedby", "tip");
    place(tip, span);
  };
  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const focused = document.activeElement;
      if (details.has(focused)) show(focused);
      else hide();
    }, 150);
  };
  document.addEventListener("pointerover", (event) => {
    const span = event.target.closest?.(".token");
    if (span && details.has(span)) show(span);
    else if (event.target.closest?.("#tip")) clearTimeout(timer);
    else if (shown) later();
  });
  document.addEventListener("focusin", (event) => (details.has(event.target) ? show(event.target) : shown && later()));
  document.addEventListener("focusout", () => shown && later());
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  document.addEventListener("scroll", () => shown && place(tip, shown), { passive: true, capture: true });
}

function place(tip, span) {
  const box = span.getClientRects()[0];
  if (!box) return;
  const margin = 8;
  const left = Math.min(Math.max(margin, box.left), Math.max(margin, document.documentElement.clientWidth - tip.offsetWidth - margin));
  const below = box.bottom + 6;
  const fits = below + tip.offsetHeight + margin < window.innerHeight || box.top < tip.offsetHeight + margin;
  tip.style.left = `${left}px`;
  tip.style.top = `${fits ? below : box.top - tip.offsetHeight - 6}px`;
}

function lines(token) {
  const recycled = token.source === "recycled";
  const parts = [make("p", { class: "tip-head" }, make("code", {}, visible(token.text)), make("span", { class: "soft" }, ` id ${token.id}`))];
  let source = "Full model";
  if (recycled) source = token.verified ? "Recycled: drafted by the module, confirmed by the full model" : "Recycled: kept without a check";
  parts.push(make("p", { class: recycled ? "tip-source recycled" : "tip-source" }, source));
  if (Number.isFinite(token.logprob)) {
    const probability = Math.exp(token.logprob);
    parts.push(make("p", {}, `Probability ${percent(probability, 1)}`, make("span", { class: "soft" }, `  log ${number(token.logprob, 3)}`)));
    const meter = make("span", { class: "meter", "aria-hidden": "true" }, make("span", {}));
    meter.firstChild.style.width = `${100 * probability}%`;
    parts.push(meter);
  } else {
    parts.push(make("p", { class: "soft" }, "No probability: the full model did not judge it"));
  }
  if (token.parts > 1) parts.push(make("p", { class: "soft" }, `Last of ${token.parts} tokens that make one character`));
  if (token.rejected?.length) {
    parts.push(make("p", {}, "Rejected before it: ", ...token.rejected.flatMap((draft, i) => [i ? " " : null, make("del", {}, readable(draft.text))])));
  }
  return parts;
}

function readable(text) {
  return text.trim() || visible(text);
}

// Blanks and line ends as signs, for texts that may consist of nothing else
function visible(text) {
  return text.replace(/^ /, "\u2423").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5") || "\u2205";
}
