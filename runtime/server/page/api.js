// The server, as any OpenAI client sees it. Everything that goes wrong is an Error whose message is for people.

import { key } from "./store.js";

export class ApiError extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

async function ask(path, body, signal) {
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key() && { Authorization: "Bearer " + key() }) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    throw signal?.aborted ? error : new ApiError("The server does not answer. Is it still running?", 0);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new ApiError(said?.error?.message ?? `The server answered ${response.status} ${response.statusText}`, response.status);
}

export const models = async () => (await (await ask("v1/models")).json()).data.map((model) => model.id);
export const takesFeedback = async () => (await (await ask("v1/feedback")).json()).enabled;
export const feedback = (record) => ask("v1/feedback", record);

/** The chunks of a reply as they come. Throws where it breaks off, and an AbortError when `signal` stops it. */
export async function* stream(request, signal) {
  const response = await ask("v1/chat/completions", { ...request, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw signal.aborted ? error : new ApiError("The connection broke before the reply was whole.", 0);
    });
    if (done) throw new ApiError("The server ended before the reply was whole.", 0);
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;               // a ping, or the empty line between two
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message ?? "The server failed.", 500);
      yield chunk;
    }
  }
}
