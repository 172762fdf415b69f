// Talks to the server: requests with the key, errors as one line, server-sent events as they come.

const KEY = "ddit-key";

/** What the server refused, or why it did not answer. `status` is 0 where there was no response. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Send this key with every request until the tab is closed. */
export function rememberKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** The model that is served, as GET /v1/models describes it. */
export async function fetchModel() {
  const response = await request("v1/models");
  return (await response.json()).data[0];
}

/** The events of a picture, one after the other. Aborting `signal` cancels the picture. */
export async function* generate(body, signal) {
  const text = JSON.stringify({ ...body, stream: true, progress: true });
  const response = await request("v1/images/generations", { method: "POST", body: text, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch(connectionFailed);
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((one) => one.startsWith("data: ")); // comments have none
      if (!line) continue;
      const event = JSON.parse(line.slice("data: ".length));
      if (event.type === "error") throw new ApiError(response.status, event.error.message);
      signal.throwIfAborted(); // events may have come with the last one
      yield event;
    }
  }
}

async function request(path, options = {}) {
  const headers = { "content-type": "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers }).catch(connectionFailed);
  if (response.ok) return response;
  const body = await response.json().catch(() => null); // a proxy in between may answer otherwise
  throw new ApiError(response.status, body?.error?.message ?? `the server answered with status ${response.status}`);
}

function connectionFailed(error) {
  if (error.name === "AbortError") throw error;
  throw new ApiError(0, "the connection to the server failed; is it running?");
}
