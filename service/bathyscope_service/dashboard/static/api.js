// Calls of the service. The key lives in sessionStorage and goes out in the Authorization header, never in an address.

const SLOT = "bathyscope.key";

export const key = {
  get: () => sessionStorage.getItem(SLOT) || "",
  set: (value) => sessionStorage.setItem(SLOT, value),
  forget: () => sessionStorage.removeItem(SLOT),
};

/** An answer that is no success. `status` 0: no answer at all. */
export class Problem extends Error {
  constructor(status, document) {
    super(document.detail || document.title || `The service answered ${status}.`);
    this.status = status;
    this.errors = Array.isArray(document.errors) ? document.errors : [];
    this.retryAfter = document.retry_after;
  }
}

let refused = () => {};
/** `then` is called whenever the service does not take the key. */
export function onRefused(then) {
  refused = then;
}

async function ask(path, { method = "GET", body, headers = {}, signal } = {}) {
  const all = { ...headers };
  if (key.get()) all.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) all["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method,
      headers: all,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      credentials: "omit",
      redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { detail: "The service does not answer." });
  }
  if (answer.ok) return answer;
  const document = await answer.json().catch(() => ({}));
  document.retry_after = Number(answer.headers.get("Retry-After")) || undefined;
  if (answer.status === 401) refused();
  throw new Problem(answer.status, document);
}

export const get = async (path, signal) => (await ask(path, { signal })).json();
export const blob = async (path, signal) => (await ask(path, { signal })).blob();
export const post = async (path, body, headers) => (await ask(path, { method: "POST", body, headers })).json();

const ENDED = new Set(["succeeded", "failed", "cancelled", "expired"]);
export const ended = (job) => ENDED.has(job.status);

const pause = (ms, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });

/** Calls `seen` with the job at each of its events until it has ended, and gives the job as it was last. A stream that
 * breaks is taken up again after the event that came last. */
export async function follow(id, seen, signal = new AbortController().signal) {
  let last = "";
  let job = null;
  for (let failures = 0; !signal.aborted; ) {
    try {
      const headers = { Accept: "text/event-stream", ...(last ? { "Last-Event-ID": last } : {}) };
      const answer = await ask(`/v1/jobs/${encodeURIComponent(id)}/events`, { headers, signal });
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
        failures = 0;
        const parts = (rest + piece.value).split("\n\n");
        rest = parts.pop();
        for (const part of parts) {
          const event = fields(part);
          if (event.id) last = event.id;
          if (!event.data) continue;
          job = JSON.parse(event.data);
          seen(job);
          if (event.event === "done") return job;
        }
      }
      failures += 1; // the service ended the stream, as it does when it stops
      await pause(1000 * Math.min(failures, 10), signal);
    } catch (error) {
      if (signal.aborted) break;
      const lasting = error instanceof Problem && error.status >= 400 && error.status < 500 && error.status !== 429;
      if (lasting) throw error;
      failures += 1;
      await pause(1000 * (error.retryAfter || Math.min(failures, 10)), signal);
    }
  }
  return job;
}

function fields(part) {
  const found = {};
  for (const line of part.split("\n")) {
    const at = line.indexOf(":");
    if (at > 0) found[line.slice(0, at)] = line.slice(at + 1).replace(/^ /, "");
  }
  return found;
}

/** Sends work and gives its job once it has ended; one that failed is thrown. */
export async function work(path, body, seen = () => {}, signal) {
  let job = await post(path, body);
  seen(job);
  if (!ended(job)) job = await follow(job.id, seen, signal);
  if (job && job.status !== "succeeded" && !signal?.aborted) {
    throw new Problem(409, job.error || { detail: `The job was not done: it is ${job.status}.` });
  }
  return job;
}

export async function download(path, name) {
  const url = URL.createObjectURL(await blob(path));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
