// What the page asks of the server, and what went wrong, in plain words.

export class Problem extends Error {
  constructor(message, wrongKey = false) {
    super(message);
    this.wrongKey = wrongKey;
  }
}

let key = sessionStorage.getItem("key") ?? "";

export function setKey(value) {
  key = value;
  sessionStorage.setItem("key", key);
}

export const hasKey = () => key !== "";

async function ask(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const request = body ? { method: "POST", body, signal, headers: { ...headers, "Content-Type": "application/json" } } : { signal, headers };
  let response;
  try {
    response = await fetch(path, request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw key && /[^\x20-\x7e]/.test(key) // no header can hold it
      ? new Problem("The server does not take this API key.", true)
      : new Problem("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw problem(response.status, await response.text(), response.headers.get("Retry-After"));
  return response;
}

function problem(status, body, wait) {
  const told = messageOf(body);
  if (status === 401) return new Problem("The server does not take this API key.", true);
  if (status === 413) return new Problem("This is more than the server takes at once. Remove some pictures, or begin a new conversation.");
  if (status === 429) return new Problem(`The server is busy with others. Try again in ${wait ?? "a few"} seconds.`);
  if (status === 503) return new Problem(`The server takes no question now: ${told}.`);
  if (status === 504) return new Problem("The answer took too long, and the server gave up.");
  if (status >= 500) return new Problem("The server failed to answer. Its log says why.");
  return new Problem(`The server refused: ${told}`);
}

function messageOf(body) {
  try {
    return JSON.parse(body).error.message;
  } catch {
    return body.slice(0, 300); // a proxy's page
  }
}

export const settings = async () => (await ask("page/settings")).json();

export const routes = async (body, signal) => (await ask("routes", JSON.stringify(body), signal)).json();

// Calls `onText` with every piece of an answer; returns why it ended: "stop" or "length".
export async function complete(body, signal, onText) {
  const response = await ask("v1/chat/completions", JSON.stringify({ ...body, stream: true }), signal);
  let reason = null;
  for await (const event of events(response, signal)) {
    if (event === "[DONE]") return reason;
    const found = JSON.parse(event);
    if (found.error) throw new Problem(`The answer ended early: ${found.error.message}.`);
    const choice = found.choices[0];
    reason = choice.finish_reason ?? reason;
    if (choice.delta.content) onText(choice.delta.content);
  }
  throw new Problem("The connection to the server ended in the midst of the answer.");
}

// The data of server-sent events.
async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      return;
    }
    if (read.done) return;
    const parts = (held + read.value).split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}
