// Jobs, live: the list is read again every few seconds, and what runs is listened to.
import { ended, follow, get, post, Problem } from "../api.js";
import { Badge, Facts, href, html, Progress, Raw, resourceLink, seconds, Trouble, useEffect, useLoad, useState, When } from "../ui.js";

const KINDS = ["adapter", "extraction", "probe", "prediction", "comparison", "experiment", "model"];
const STATES = ["queued", "running", "succeeded", "failed", "cancelled"];
const MOST_STREAMS = 3; // a browser has six connections to a host, and the rest of the page needs some

function Cancel({ job, onError }) {
  const [asked, setAsked] = useState(false);
  if (ended(job)) return "";
  const go = async () => {
    setAsked(true);
    try {
      await post(`/v1/jobs/${encodeURIComponent(job.id)}/cancel`);
    } catch (error) {
      onError(error);
      setAsked(false);
    }
  };
  return html`<button type="button" disabled=${asked} onClick=${go} aria-label=${`Cancel ${job.kind} ${job.id}`}>
    ${asked ? "Cancelling…" : "Cancel"}
  </button>`;
}

/** The jobs as they are, those that run kept up to date by their events. */
function useLive(jobs) {
  const [newer, setNewer] = useState({});
  const open = jobs.filter((job) => !ended(newer[job.id] || job));
  open.sort((one, other) => (one.status === "running" ? 0 : 1) - (other.status === "running" ? 0 : 1));
  const listened = open.slice(0, MOST_STREAMS).map((job) => job.id).sort().join(" ");
  useEffect(() => {
    const stop = new AbortController();
    for (const id of listened.split(" ").filter(Boolean)) {
      follow(id, (job) => setNewer((old) => ({ ...old, [id]: job })), stop.signal).catch(() => {}); // the list has it
    }
    return () => stop.abort();
  }, [listened]);
  return jobs.map((job) => (newer[job.id] && !ended(job) ? newer[job.id] : job));
}

const columns = (onError) => [
  ["Job", (job) => html`<a href=${href("jobs", job.id)}>${job.kind}</a>`],
  ["Of", (job) => job.request.name || job.request.model || job.request.source || ""],
  ["Status", (job) => html`<${Badge}>${job.status}<//>`],
  ["Progress", (job) => (job.error ? html`<span class="clip">${job.error.detail || job.error.title}</span>` : html`<${Progress} job=${job} />`)],
  ["Took", (job) => (job.timings.total === undefined ? "" : seconds(job.timings.total))],
  ["Made", (job) => html`<${When} at=${job.created_at} />`],
  ["", (job) => (resourceLink(job.resource)
      ? html`<a href=${resourceLink(job.resource)}>Open<span class="unseen"> what ${job.kind} ${job.id} made</span></a>`
      : html`<${Cancel} job=${job} onError=${onError} />`)],
];

export function JobList() {
  const [kind, setKind] = useState("");
  const [status, setStatus] = useState("");
  const [older, setOlder] = useState(0);
  const [error, setError] = useState(null);
  const query = (kind && `&kind=${kind}`) + (status && `&status=${status}`);
  const limit = 25 * (older + 1);
  const list = useLoad((signal) => get(`/v1/jobs?limit=${Math.min(limit, 200)}${query}`, signal), [query, limit], 3000);
  const jobs = useLive(list.value ? list.value.data : []);
  const choice = (name, value, set, all) => html`<label>${name}${" "}
    <select value=${value} onChange=${(event) => set(event.target.value)}>
      <option value="">all</option>
      ${all.map((word) => html`<option value=${word}>${word}</option>`)}
    </select>
  </label>`;
  const shown = columns(setError);
  return html`<h1>Jobs</h1>
    <p class="row">${choice("Kind", kind, setKind, KINDS)} ${choice("Status", status, setStatus, STATES)}</p>
    <${Trouble} error=${error || list.error} />
    ${list.value === undefined
      ? !list.error && html`<p class="quiet" role="status">Loading…</p>`
      : html`<${Jobs} jobs=${jobs} columns=${shown} />
          ${list.value.next_cursor && limit < 200 && html`<p><button type="button" onClick=${() => setOlder(older + 1)}>Older ones</button></p>`}`}`;
}

function Jobs({ jobs, columns }) {
  if (jobs.length === 0) return html`<p class="quiet">No jobs. <a href="#/extractions">Start an extraction</a>.</p>`;
  return html`<div class="wide"><table class="jobs">
    <caption class="unseen">Jobs, newest first</caption>
    <thead><tr>${columns.map(([name]) => html`<th scope="col">${name}</th>`)}</tr></thead>
    <tbody>${jobs.map((job) => html`<tr key=${job.id}>
      ${columns.map(([name, cell]) => html`<td data-label=${name}><span>${cell(job)}</span></td>`)}
    </tr>`)}</tbody>
  </table></div>`;
}

export function JobPage({ id }) {
  const [job, setJob] = useState(null);
  const [error, setError] = useState(null);
  useEffect(() => {
    const stop = new AbortController();
    follow(id, setJob, stop.signal).catch((fault) => stop.signal.aborted || setError(fault));
    return () => stop.abort();
  }, [id]);
  if (!job) return html`<h1>Job</h1><${Trouble} error=${error} />${!error && html`<p class="quiet" role="status">Loading…</p>`}`;
  const link = resourceLink(job.resource);
  return html`<h1>Job: ${job.kind}</h1>
    <p class="row" aria-live="polite"><${Badge}>${job.status}<//> <${Progress} job=${job} /> <${Cancel} job=${job} onError=${setError} />
      ${link && html`<a class="button main" href=${link}>Open what it made</a>`}</p>
    <${Trouble} error=${error} />
    <${Trouble} error=${job.error && new Problem(job.error.status, job.error)} />
    <${Facts} of=${[
      ["Id", html`<code>${job.id}</code>`],
      ["Priority", job.priority],
      ["Attempt", `${job.attempt} of ${job.max_attempts}`],
      ["Accepted", html`<${When} at=${job.created_at} />`],
      ["Ended", job.finished_at && html`<${When} at=${job.finished_at} />`],
      ...Object.entries(job.timings).map(([name, value]) => [`Time: ${name}`, seconds(value)]),
    ]} />
    <${Raw} title="What was asked for" value=${job.request} />`;
}
