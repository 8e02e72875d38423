// Comparisons: what a fine-tune, or a quantization, did.
import { download, get } from "../api.js";
import { Badge, Facts, figure, href, html, leading, Listing, Loaded, number, Picture, Raw, Table, Trouble, useLoad, useState, When } from "../ui.js";

const names = (comparison) => comparison.variants.map((variant) => variant.name).join(", ");

const COLUMNS = [
  ["Comparison", (cmp) => html`<a href=${href("comparisons", cmp.id)}>${cmp.name || cmp.id.slice(0, 14) + "…"}</a>`],
  ["Model", (cmp) => cmp.model],
  ["Of", (cmp) => html`<${Badge}>${cmp.compares}<//>`],
  ["Variants", names],
  ["Rows", (cmp) => number(cmp.inputs)],
  ["Made", (cmp) => html`<${When} at=${cmp.created_at} />`],
];

export const ComparisonList = () => html`<h1>Comparisons</h1>
  <${Listing} path="/v1/comparisons" columns=${COLUMNS} caption="Comparisons, newest first" empty="No comparisons yet: POST /v1/comparisons makes one." />`;

function Matrix({ title, rows, variants, cell }) {
  return html`<h2>${title}</h2>
    <div class="wide"><table class="matrix">
      <caption class="unseen">${title}</caption>
      <thead><tr><td></td>${variants.map((name) => html`<th scope="col">${name}</th>`)}</tr></thead>
      <tbody>${rows.map((row, i) => html`<tr><th scope="row">${variants[i]}</th>${row.map((value) => html`<td>${cell(value)}</td>`)}</tr>`)}</tbody>
    </table></div>`;
}

function Found({ comparison }) {
  const { report } = comparison;
  const variants = report.variants.map((variant) => variant.name);
  const against = Object.fromEntries(report.differences.map((found) => [found.name, found]));
  const shift = Object.fromEntries((report.shift || []).map((found) => [found.name, found]));
  return html`
    ${report.warnings.length > 0 &&
    html`<div class="warnings"><h2>Warnings</h2><ul>${report.warnings.map((words) => html`<li>${words}</li>`)}</ul></div>`}
    <h2>Variants</h2>
    <${Table} caption="Figures of each variant" rows=${report.variants} columns=${[
      ["Variant", (one) => one.name],
      ["Best layer", (one) => one.best_layer],
      ["Held out", (one) => leading(one.held_out).map((of, i) => (i ? figure(of) : of)).join(" ")],
      ["ECE", (one) => figure(one.held_out.ece)],
      [`Minus ${variants[0]}`, (one) => (against[one.name] ? figure(leading(against[one.name].held_out)[1]) : "–")],
      ["Largest shift", (one) => (shift[one.name] ? number(Math.max(...shift[one.name].layers.map((layer) => layer.relative_norm.mean ?? 0))) : "–")],
    ]} />
    <${Matrix} title=${`Transfer: ${report.transfer.metric} of a probe trained on the row, read on the column`}
      rows=${report.transfer.values} variants=${variants} cell=${figure} />
    <details><summary>Protocol</summary><p>${report.protocol}</p></details>`;
}

export function ComparisonPage({ id }) {
  const path = `/v1/comparisons/${encodeURIComponent(id)}`;
  const found = useLoad((signal) => get(path, signal), [id]);
  const [error, setError] = useState(null);
  return html`<${Loaded} of=${found}>${(cmp) => html`
    <h1>${cmp.name || "Comparison"}</h1>
    <p class="row"><button type="button" onClick=${() => download(`${path}/report`, `${id}.html`).catch(setError)}>Report as a page</button></p>
    <${Trouble} error=${error} />
    <${Facts} of=${[
      ["Model", cmp.model],
      ["Compares", cmp.compares],
      ["Variants", names(cmp)],
      ["Rows", number(cmp.inputs)],
      ["Layers", cmp.layers.join(", ")],
      ["Made", html`<${When} at=${cmp.created_at} />`],
      ["Id", html`<code>${cmp.id}</code>`],
    ]} />
    <div class="pictures">
      <${Picture} path=${`${path}/plots/layer_curve`} caption="Layer curves" optional alt="Each variant's score by layer, with intervals." />
      ${cmp.compares === "checkpoints" && html`<${Picture} path=${`${path}/plots/steps`} caption="Steps" optional alt="Each checkpoint's score in their order; its numbers are in the table below." />`}
      <${Picture} path=${`${path}/plots/transfer`} caption="Transfer" optional alt="Transfer matrix; its numbers are in the table below." />
      <${Picture} path=${`${path}/plots/layer_shift`} caption="Layer shift" optional alt="How far each variant's states moved, by layer." />
    </div>
    ${cmp.notices?.length > 0 && html`<div class="warnings"><h2>Notices</h2><ul>${cmp.notices.map((words) => html`<li>${words}</li>`)}</ul></div>`}
    ${cmp.report && html`<${Found} comparison=${cmp} />`}
    <${Raw} title="What was compared" value=${cmp.variants} />`}<//>`;
}
