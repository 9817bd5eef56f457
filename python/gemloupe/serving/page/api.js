// The server's API, the same that other clients use.

const KEY = "gemloupe-api-key";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY),
  set: (key) => sessionStorage.setItem(KEY, key),
  drop: () => sessionStorage.removeItem(KEY),
};

// What went wrong, in words. `status` is 0 where no answer came at all.
export class Failure extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

function headers() {
  const key = apiKey.get();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(), credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server can't be reached. Is it still running?");
  }
  if (response.ok) return response;
  let said = "";
  try {
    said = (await response.json()).error?.message ?? "";
  } catch {
    // Not JSON: the status has to do.
  }
  const wait = Number(response.headers.get("Retry-After")) || null;
  throw new Failure(explained(response.status, said, wait), response.status, wait);
}

function explained(status, said, wait) {
  const again = wait ? ` Try again in ${wait} s.` : "";
  if (status === 429) return `The server is busy: ${said || "too many requests"}.${again}`;
  if (status === 413) return `That is too large: ${said}.`;
  if (status === 503) return `The server can't answer now: ${said}.${again}`;
  return said || `The server answered with status ${status}.`;
}

export async function listModels() {
  const response = await call("/v1/models", {});
  return (await response.json()).data;
}

// The events of a streamed answer: {chunk} for each, {warning} first where there is one.
export async function* streamChat(body, signal) {
  const options = { method: "POST", body: JSON.stringify(body), signal };
  const response = await call("/v1/chat/completions", options);
  const warning = response.headers.get("X-Gemloupe-Warning");
  if (warning) yield { warning };
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) throw new Failure("The connection ended before the answer did.");
      const events = (held + value).split("\n\n");
      held = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Failure(chunk.error.message ?? "The answer failed.", 500);
        yield { chunk };
      }
    }
  } catch (error) {
    if (error instanceof Failure || error.name === "AbortError") throw error;
    throw new Failure("The connection broke before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
