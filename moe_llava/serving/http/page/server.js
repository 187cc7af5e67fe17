// Send requests to the server, and describe errors to the user.

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

async function send(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const request = body ? { method: "POST", body, signal, headers: { ...headers, "Content-Type": "application/json" } } : { signal, headers };
  let response;
  try {
    response = await fetch(path, request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw key && /[^\x20-\x7e]/.test(key) // not allowed in a header
      ? new Problem("The server does not accept this API key.", true)
      : new Problem("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw problem(response.status, await response.text(), response.headers.get("Retry-After"));
  return response;
}

function problem(status, body, wait) {
  const message = messageOf(body);
  if (status === 401) return new Problem("The server does not accept this API key.", true);
  if (status === 413) return new Problem("The conversation is too large for the server. Remove some pictures, or start a new conversation.");
  if (status === 429) return new Problem(`The server is busy. Try again in ${wait ?? "a few"} seconds.`);
  if (status === 503) return new Problem(`The server is not available: ${message}.`);
  if (status === 504) return new Problem("The answer exceeded the server's time limit.");
  if (status >= 500) return new Problem("The server failed to answer. Its log has the details.");
  return new Problem(`The server refused the request: ${message}`);
}

function messageOf(body) {
  try {
    return JSON.parse(body).error.message;
  } catch {
    return body.slice(0, 300); // a page of a proxy
  }
}

export const settings = async () => (await send("page/settings")).json();

export const routes = async (body, signal) => (await send("routes", JSON.stringify(body), signal)).json();

// Call `onText` with each piece of an answer. Return the finish reason: "stop" or "length".
export async function complete(body, signal, onText) {
  const response = await send("v1/chat/completions", JSON.stringify({ ...body, stream: true }), signal);
  let reason = null;
  for await (const event of events(response, signal)) {
    if (event === "[DONE]") return reason;
    const chunk = JSON.parse(event);
    if (chunk.error) throw new Problem(`The answer failed: ${chunk.error.message}.`);
    const choice = chunk.choices[0];
    reason = choice.finish_reason ?? reason;
    if (choice.delta.content) onText(choice.delta.content);
  }
  throw new Problem("The connection to the server was lost during the answer.");
}

// Yield the data of server-sent events.
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
