// The page: the server's state, views, keys, and the prompt's form.

import { call, setApiKey } from "./api.js";
import { Conversation } from "./conversation.js";
import { showRun } from "./curves.js";
import { $, make } from "./dom.js";
import { offer, read, refresh } from "./settings.js";
import { installTip } from "./tokens.js";

const EXAMPLES = {
  text: ["The Congress of the United States", "Once upon a time there was", "def fibonacci(n):"],
  chat: [
    "Why is the sky blue?",
    "Write a Python function that reverses a list.",
    "A train travels 60 km in 40 minutes. What is its speed in km/h?",
    "Write the opening of a story about a lighthouse keeper.",
  ],
};
const STATES = {
  ready: "ready",
  loading: "loading the model",
  draining: "shutting down: takes no new prompts",
  failed: "the engine has failed",
  unreachable: "not reachable",
};
const SLOW = 15000; // between questions about the state when all is well, in ms
const FAST = 2000;

let model = null;
let timer = 0;
const conversation = new Conversation(update);

async function watch() {
  clearTimeout(timer);
  let state = "ready";
  try {
    await call("ready");
  } catch (error) {
    state = STATES[error.code] ? error.code : "loading";
    if (error.status === 401) state = "ready";
  }
  const returned = state === "ready" && $("state").dataset.state !== "ready"; // perhaps with another model
  $("state").dataset.state = state;
  if ($("state-text").textContent !== STATES[state]) $("state-text").textContent = STATES[state];
  if (returned || (state === "ready" && model === null)) await connect();
  clearTimeout(timer);
  timer = setTimeout(watch, state === "ready" && model !== null ? SLOW : FAST);
}

async function connect() {
  if (!$("key-form").hidden) return; // waits for the key
  let found;
  try {
    found = (await (await call("v1/models")).json()).data[0];
    delete found.created; // another one after each restart
  } catch (error) {
    complain(error);
    return;
  }
  if (JSON.stringify(found) === JSON.stringify(model)) return;
  model = found;
  $("model-name").textContent = model.id;
  $("model-context").textContent = model.max_model_len ? `context ${model.max_model_len.toLocaleString("en")}` : "";
  document.title = `${model.id} · recycle_ds`;
  $("views").hidden = !model.run;
  offer(model);
  update();
}

async function send() {
  const prompt = $("prompt").value;
  if (conversation.running) return;
  if (!prompt.trim()) {
    $("prompt").focus();
    return;
  }
  const settings = model && read(model);
  if (!settings) return;
  $("notice").hidden = true;
  if (settings.chat) $("prompt").value = "";
  try {
    await conversation.send(prompt, settings);
  } catch (error) {
    if (settings.chat && !$("prompt").value) $("prompt").value = prompt;
    complain(error);
  }
}

function complain(error) {
  if (error.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  }
  if (error.status === undefined) throw error; // not the server's: a mistake of this page
  if (error.status === 503 || error.code === "unreachable") watch();
  $("notice").textContent = error.message;
  $("notice").hidden = false;
}

function update() {
  const { running } = conversation;
  const focused = document.activeElement; // a button that is switched off would lose the focus, and with it the keys
  $("stop").disabled = !running;
  $("send").disabled = running || model === null;
  if (running && focused === $("send")) $("stop").focus();
  if (!running && focused === $("stop")) $("prompt").focus();
  $("clear").hidden = running || conversation.empty;
  $("welcome").hidden = !conversation.empty;
  $("decode").dataset.running = String(running);
  showExamples();
}

function showExamples() {
  const kind = document.querySelector("input[name=kind]:checked").value;
  if ($("examples").dataset.kind === kind) return;
  $("examples").dataset.kind = kind;
  $("examples").replaceChildren(...EXAMPLES[kind].map((text) => make("li", {}, make("button", { type: "button" }, text))));
}

function view(name) {
  for (const each of ["decode", "run"]) {
    $(each).hidden = each !== name;
    $(`view-${each}`).setAttribute("aria-pressed", String(each === name));
  }
  if (name === "run") showRun().catch(complain);
}

function wire() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("form").addEventListener("input", () => {
    refresh();
    showExamples();
  });
  $("stop").addEventListener("click", () => conversation.stop());
  $("clear").addEventListener("click", () => {
    conversation.clear();
    $("prompt").focus();
  });
  $("examples").addEventListener("click", (event) => {
    if (event.target.tagName !== "BUTTON") return;
    $("prompt").value = event.target.textContent;
    $("prompt").focus();
  });
  $("show-rejected").addEventListener("change", (event) => {
    $("decode").classList.toggle("with-rejected", event.target.checked);
  });
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setApiKey($("key").value.trim());
    $("key").value = "";
    $("key-form").hidden = true;
    $("notice").hidden = true;
    $("prompt").focus();
    if (model === null) connect();
  });
  $("view-decode").addEventListener("click", () => view("decode"));
  $("view-run").addEventListener("click", () => view("run"));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") conversation.stop();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      send();
    }
  });
  const narrow = matchMedia("(max-width: 60rem)");
  const fold = () => ($("settings").open = !narrow.matches);
  narrow.addEventListener("change", fold);
  fold();
}

wire();
installTip();
update();
watch();
