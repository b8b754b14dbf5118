// Requests to the server: the API key, server-sent events, and errors in plain words.

const KEY = "recycle_ds.api_key";

export function apiKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return ""; // storage is switched off: the key has to be typed again after a reload
  }
}

let memory = "";

export function setApiKey(key) {
  memory = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // kept in memory only
  }
}

// status: HTTP status, or 0 if there was no answer. code: the server's, or "unreachable" or "cut".
export class ServerError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// Paths are relative to the page, so that it also works below a path of a reverse proxy.
export async function call(path, { body, signal } = {}) {
  const key = memory || apiKey();
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body ? JSON.stringify(body) : undefined,
      signal,
      cache: "no-cache",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?", 0, "unreachable");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // no JSON: a proxy's own page, for example
  }
  return new ServerError(inWords(response.status, error, response.headers.get("retry-after")), response.status, error.code ?? null);
}

function inWords(status, error, retryAfter) {
  const wait = retryAfter ? ` Try again in ${retryAfter} s.` : "";
  const said = error.message ? ` ${capital(error.message)}` : "";
  if (status === 401) return "This server asks for an API key.";
  if (status === 429) return `The server is busy.${said}${wait}`;
  if (status === 503) return `The server takes no requests at the moment.${said}${wait}`;
  if (status >= 500) return `The server failed (${status}).${said}`;
  return said.trim() || `The server refused the request (${status}).`;
}

function capital(text) {
  const first = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(first) ? first : `${first}.`;
}

// The objects of a stream, until [DONE]. An error inside the stream is thrown; so is an end without [DONE].
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        break;
      }
      if (part.done) break;
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const text = line.trimEnd();
        if (!text.startsWith("data:")) continue; // comments that keep the connection open, and empty lines
        const data = text.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(capital(event.error.message ?? "the server failed"), 0, event.error.code ?? null);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ServerError("The connection ended before the answer was complete.", 0, "cut");
}
