// What every view is made of. Values are children or attributes of elements, which Preact escapes; nothing is ever
// read as HTML, and no address is made of what others wrote.
import { h, render } from "./vendor/preact.mjs";
import { useCallback, useEffect, useMemo, useRef, useState } from "./vendor/hooks.mjs";
import htm from "./vendor/htm.mjs";
import { blob, download, get, Problem } from "./api.js";

export const html = htm.bind(h);
export { render, useCallback, useEffect, useMemo, useRef, useState };

const segment = encodeURIComponent;
export const href = (...parts) => "#/" + parts.map(segment).join("/");

/** `{value, error, loading, again}` of an asynchronous function, called anew when `inputs` change or every `every` ms. */
export function useLoad(load, inputs, every = 0) {
  const [state, setState] = useState({ loading: true });
  const [round, setRound] = useState(0);
  useEffect(() => {
    const stop = new AbortController();
    let timer;
    const run = async () => {
      try {
        const value = await load(stop.signal);
        if (!stop.signal.aborted) setState({ value, loading: false });
      } catch (error) {
        if (!stop.signal.aborted) setState((old) => ({ value: old.value, error, loading: false }));
      }
      if (every && !stop.signal.aborted) timer = setTimeout(run, document.hidden ? every * 5 : every);
    };
    run();
    return () => (stop.abort(), clearTimeout(timer));
  }, [...inputs, round]);
  return { ...state, again: useCallback(() => setRound((n) => n + 1), []) };
}

export function Trouble({ error }) {
  if (!error) return null;
  const faults = error instanceof Problem ? error.errors.slice(0, 8) : [];
  return html`<div class="trouble" role="alert">
    <p>${error.message}</p>
    ${faults.length > 0 &&
    html`<ul>
      ${faults.map((fault) => html`<li><code>${fault.pointer}</code> ${fault.detail}</li>`)}
    </ul>`}
  </div>`;
}

/** What was loaded, or that it is loading, or why it is not there. */
export function Loaded({ of: state, children }) {
  return html`<${Trouble} error=${state.error} />
    ${state.value === undefined ? !state.error && html`<p class="quiet" role="status">Loading…</p>` : children(state.value)}`;
}

/** Rows of a list with the columns `[heading, cell of a row]`; on a phone each row is a card. */
export function Table({ caption, columns, rows, empty }) {
  if (rows.length === 0) return html`<p class="quiet">${empty || "There is nothing here yet."}</p>`;
  return html`<div class="wide"><table>
    <caption class="unseen">${caption}</caption>
    <thead><tr>${columns.map(([name]) => html`<th scope="col">${name}</th>`)}</tr></thead>
    <tbody>
      ${rows.map(
        (row) => html`<tr key=${row.id || row.name || row.layer}>
          ${columns.map(([name, cell]) => html`<td data-label=${name}><span>${cell(row)}</span></td>`)}
        </tr>`,
      )}
    </tbody>
  </table></div>`;
}

/** A list of the service, page by page. The first page is read again every `every` ms. */
export function Listing({ path, columns, caption, empty, every = 15000, query = "" }) {
  const first = useLoad((signal) => get(`${path}?limit=25${query}`, signal), [path, query], every);
  const [more, setMore] = useState({ rows: [], cursor: undefined });
  const [error, setError] = useState(null);
  useEffect(() => setMore({ rows: [], cursor: undefined }), [path, query]);
  if (first.error && first.error.status === 501) {
    return html`<p class="quiet" role="status">${first.error.message}</p>`;
  }
  return html`<${Loaded} of=${first}>${(page) => {
    const seen = new Set(page.data.map((row) => row.id));
    const rows = [...page.data, ...more.rows.filter((row) => !seen.has(row.id))];
    const cursor = more.cursor === undefined ? page.next_cursor : more.cursor;
    const go = async () => {
      try {
        const next = await get(`${path}?limit=25${query}&cursor=${segment(cursor)}`);
        setMore({ rows: [...more.rows, ...next.data], cursor: next.next_cursor });
        setError(null);
      } catch (fault) {
        setError(fault);
      }
    };
    return html`<${Table} caption=${caption} columns=${columns} rows=${rows} empty=${empty} />
      <${Trouble} error=${error} />
      ${cursor && html`<p><button type="button" onClick=${go}>Older ones</button></p>`}`;
  }}<//>`;
}

export const Badge = ({ children }) => html`<span class=${"badge " + String(children).replace(/[^a-z]/g, "")}>${children}</span>`;

export function Facts({ of: facts }) {
  const shown = facts.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return html`<dl class="facts">
    ${shown.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}
  </dl>`;
}

export const Raw = ({ title, value }) =>
  html`<details><summary>${title}</summary><pre tabindex="0">${JSON.stringify(value, null, 2)}</pre></details>`;

const scheme = matchMedia("(prefers-color-scheme: dark)");
export function useTheme() {
  const [dark, setDark] = useState(scheme.matches);
  useEffect(() => {
    const changed = () => setDark(scheme.matches);
    scheme.addEventListener("change", changed);
    return () => scheme.removeEventListener("change", changed);
  }, []);
  return dark ? "dark" : "light";
}

/** A picture of the service, fetched with the key, in the colours of the page. */
export function Picture({ path, alt, caption, optional }) {
  const theme = useTheme();
  const [shown, setShown] = useState({});
  useEffect(() => {
    const stop = new AbortController();
    let url;
    blob(`${path}?format=svg&theme=${theme}`, stop.signal)
      .then((content) => {
        url = URL.createObjectURL(content);
        setShown({ url });
      })
      .catch((error) => stop.signal.aborted || setShown({ error }));
    return () => {
      stop.abort();
      if (url) URL.revokeObjectURL(url);
    };
  }, [path, theme]);
  if (shown.error) return optional ? null : html`<${Trouble} error=${shown.error} />`;
  return html`<figure class="picture">
    ${shown.url ? html`<img src=${shown.url} alt=${alt} />` : html`<p class="quiet" role="status">Drawing…</p>`}
    <figcaption>
      ${caption}
      ${" "}<button type="button" class="link" onClick=${() => download(`${path}?format=png&theme=${theme}`, `${caption}.png`)}>PNG</button>
    </figcaption>
  </figure>`;
}

/** Bars of one number a layer, drawn without a library; the numbers are in the table below it. */
export function Bars({ values, label, from = 0 }) {
  const most = Math.max(...values.map((value) => Math.abs(value ?? 0)), 1e-12);
  const width = 100 / values.length;
  return html`<svg class="bars" viewBox="0 0 100 30" preserveAspectRatio="none" role="img" aria-label=${label}>
    ${values.map((value, i) => {
      const height = (Math.abs(value ?? 0) / most) * 29;
      return html`<rect x=${i * width + width * 0.1} y=${30 - height} width=${width * 0.8} height=${height}>
        <title>${`layer ${i + from}: ${number(value)}`}</title>
      </rect>`;
    })}
  </svg>`;
}

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (!Number.isFinite(value)) return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 0.001 || value === 0 ? value.toFixed(digits) : value.toExponential(1);
}

export function figure(of) {
  if (!of || of.value === null || of.value === undefined) return "–";
  const interval = of.low === null || of.low === undefined ? "" : ` [${number(of.low)}, ${number(of.high)}]`;
  return number(of.value) + interval;
}

/** The figure that a report leads with, and its name. */
export function leading(scores) {
  for (const [name, shown] of [["auroc", "AUROC"], ["r2", "R²"], ["accuracy", "accuracy"]]) {
    if (scores && scores[name] && scores[name].value !== null) return [shown, scores[name]];
  }
  return ["AUROC", null];
}

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (value >= 1024 && at < 4) (value /= 1024), (at += 1);
  return `${at === 0 ? value : value.toFixed(value < 10 ? 1 : 0)} ${units[at]}`;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 60 ? `${value.toFixed(value < 10 ? 1 : 0)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export function When({ at }) {
  if (!at) return "–";
  const date = new Date(at);
  const today = date.toDateString() === new Date().toDateString();
  const shown = today ? date.toLocaleTimeString("en-GB") : date.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  return html`<time datetime=${at} title=${at}>${shown}</time>`;
}

/** A digest or an id, short, whole on hover. */
export const Short = ({ of: value }) => (value ? html`<code title=${value}>${value.slice(0, 12)}…</code>` : "–");

/** Where a resource's path leads in the dashboard. */
export function resourceLink(path) {
  const found = /^\/v1\/(adapters|extractions|probes|predictions|comparisons|experiments|models|datasets)\/(.+)$/.exec(path || "");
  return found ? href(found[1], found[2]) : null;
}

export function Progress({ job }) {
  const { stage, done, total, unit } = job.progress || {};
  const words = [stage, total ? `${number(done)} of ${number(total)} ${unit || ""}` : ""].filter(Boolean).join(": ");
  if (job.status === "queued") return html`<span class="quiet">${job.queue_position ? `${job.queue_position} before it` : "next"}</span>`;
  if (job.status !== "running") return "";
  return html`<progress max=${total || 1} value=${total ? done : undefined} aria-label="progress"></progress>
    <small class="quiet">${words}</small>`;
}
