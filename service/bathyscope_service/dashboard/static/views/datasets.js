// Datasets that were uploaded.
import { get } from "../api.js";
import { bytes, Facts, href, html, Listing, Loaded, number, Raw, Table, useLoad, When } from "../ui.js";

const COLUMNS = [
  ["Dataset", (ds) => html`<a href=${href("datasets", ds.id)}>${ds.name || ds.id}</a>`],
  ["Format", (ds) => ds.format],
  ["Rows", (ds) => number(ds.rows)],
  ["Labels", (ds) => (ds.labels ? Object.keys(ds.labels).slice(0, 6).join(", ") : "")],
  ["Size", (ds) => bytes(ds.bytes)],
  ["Made", (ds) => html`<${When} at=${ds.created_at} />`],
];

export const DatasetList = () => html`<h1>Datasets</h1>
  <p class="quiet">Uploaded ones. Those that ship, <code>capitals</code> and <code>arithmetic</code>, are named in a request.</p>
  <${Listing} path="/v1/datasets" columns=${COLUMNS} caption="Datasets, newest first" empty="No datasets yet: bathyscope datasets add uploads one." />`;

const shown = (input) => (typeof input === "string" ? input : JSON.stringify(input));

export function DatasetPage({ id }) {
  const path = `/v1/datasets/${encodeURIComponent(id)}`;
  const found = useLoad((signal) => Promise.all([get(path, signal), get(`${path}/rows?limit=20`, signal)]), [id]);
  return html`<${Loaded} of=${found}>${([ds, rows]) => html`
    <h1>${ds.name || "Dataset"}</h1>
    <${Facts} of=${[
      ["Id", html`<code>${ds.id}</code>`],
      ["Format", ds.format],
      ["Rows", number(ds.rows)],
      ["Questions", number(ds.questions)],
      ["Groups", ds.groups && number(ds.groups)],
      ["Columns", ds.columns.join(", ")],
      ["Size", bytes(ds.bytes)],
      ["Made", html`<${When} at=${ds.created_at} />`],
    ]} />
    ${ds.labels && html`<${Raw} title="Labels" value=${ds.labels} />`}
    ${ds.splits && html`<${Raw} title="Splits" value=${ds.splits} />`}
    <h2>First rows</h2>
    <${Table} caption="First rows" rows=${rows.data.map((row) => ({ ...row, id: `row${row.index}` }))} columns=${[
      ["Row", (row) => row.index],
      ["Input", (row) => html`<span class="clip">${shown(row.input).slice(0, 400)}</span>`],
      ["Label", (row) => (row.label === null || row.label === undefined ? "" : String(row.label))],
      ["Group", (row) => row.group ?? ""],
      ["Split", (row) => row.split ?? ""],
    ]} />`}<//>`;
}
