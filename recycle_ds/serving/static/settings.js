// The settings' form: what the server offers, and what the user has chosen.

import { $, make } from "./dom.js";

const CHOICES = {
  "side-by-side": ["Side by side", "Autoregressive, then verified"],
  verified: ["Verified", "Drafts checked: same text, faster"],
  autoregressive: ["Autoregressive", "One token a full pass"],
  alternate: ["Alternate", "Drafts kept unchecked"],
};

// model: the server's entry of /v1/models
export function offer(model) {
  const modes = model.modes ?? ["autoregressive"];
  const both = modes.includes("verified") && modes.includes("autoregressive");
  const names = [...(both ? ["side-by-side"] : []), ...Object.keys(CHOICES).filter((name) => modes.includes(name))];
  $("modes").replaceChildren(
    ...names.map((name, i) => {
      const [title, hint] = CHOICES[name];
      const input = make("input", { type: "radio", name: "mode", value: name, checked: i === 0 });
      return make("label", {}, input, make("span", {}, title, make("small", {}, hint)));
    }),
  );
  if (!both) $("modes").append(make("p", { class: "hint" }, "This model has no recycle module: there is nothing to compare."));
  $("decode-as").hidden = false;
  $("kind").hidden = !model.chat;
  if (model.chat) document.querySelector("input[name=kind][value=chat]").checked = true;
  if (model.max_model_len) {
    $("max-tokens").max = model.max_model_len;
    if (Number($("max-tokens").value) >= model.max_model_len) $("max-tokens").value = Math.max(1, Math.floor(model.max_model_len / 2));
  }
  refresh();
}

// Returns null after showing what is wrong with a field
export function read(model) {
  const form = $("form");
  if (!form.checkValidity()) {
    $("settings").open = true; // a field inside closed details cannot show its message
    form.reportValidity();
    return null;
  }
  const mode = chosen("mode");
  const chat = chosen("kind") === "chat";
  return {
    model: model.id,
    modes: mode === "side-by-side" ? ["autoregressive", "verified"] : [mode],
    atOnce: mode === "side-by-side" && $("at-once").checked,
    chat,
    system: chat ? $("system").value.trim() : "",
    temperature: Number($("temperature").value),
    maxTokens: Number($("max-tokens").value),
    seed: optional($("seed")),
    draftTokens: optional($("draft-tokens")),
  };
}

// What depends on other fields
export function refresh() {
  const chat = chosen("kind") === "chat";
  const mode = chosen("mode");
  const temperature = Number($("temperature").value);
  $("at-once-row").hidden = mode !== "side-by-side";
  $("draft-tokens").disabled = mode === "autoregressive";
  $("system-row").hidden = !chat;
  $("seed-hint").hidden = !(temperature > 0 && $("seed").value === "" && mode === "side-by-side");
  $("prompt-label").textContent = chat ? "Message" : "Prompt";
  $("prompt").placeholder = chat ? "Ask something" : "Text that the model continues";
  const title = CHOICES[mode]?.[0].toLowerCase() ?? "";
  $("settings-summary").textContent = `${title}, temperature ${temperature}, ${$("max-tokens").value} tokens`;
}

function chosen(name) {
  return document.querySelector(`input[name=${name}]:checked`)?.value ?? null;
}

function optional(input) {
  return input.value === "" || input.disabled ? null : Number(input.value);
}
