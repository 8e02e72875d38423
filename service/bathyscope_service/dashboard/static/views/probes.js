// Probes: what each is worth, with its pictures.
import { download, get } from "../api.js";
import { Facts, figure, href, html, leading, Listing, Loaded, number, Picture, Raw, Table, Trouble, useLoad, useState, When } from "../ui.js";

const COLUMNS = [
  ["Probe", (probe) => html`<a href=${href("probes", probe.id)}>${probe.name || probe.id.slice(0, 14) + "…"}</a>`],
  ["Model", (probe) => probe.identity.model || probe.identity.base || ""],
  ["Task", (probe) => probe.task],
  ["Layer", (probe) => probe.layer],
  ["Held out", (probe) => {
    const [name, of] = leading(probe.report.held_out);
    return `${name} ${figure(of)}`;
  }],
  ["Warnings", (probe) => probe.report.warnings.length || ""],
  ["Made", (probe) => html`<${When} at=${probe.created_at} />`],
];

export const ProbeList = () => html`<h1>Probes</h1>
  <${Listing} path="/v1/probes" columns=${COLUMNS} caption="Probes, newest first" empty="No probes yet: POST /v1/probes trains one on an extraction." />`;

const FIGURES = [
  ["AUROC", "auroc"], ["Average precision", "average_precision"], ["Accuracy", "accuracy"], ["Brier", "brier"],
  ["NLL", "nll"], ["ECE", "ece"], ["R²", "r2"], ["MAE", "mae"], ["Spearman", "spearman"],
];

export function ProbePage({ id }) {
  const found = useLoad((signal) => get(`/v1/probes/${encodeURIComponent(id)}`, signal), [id]);
  const [error, setError] = useState(null);
  const path = `/v1/probes/${encodeURIComponent(id)}`;
  return html`<${Loaded} of=${found}>${(probe) => {
    const { report } = probe;
    const there = FIGURES.filter(([, name]) => report.held_out[name] && report.held_out[name].value !== null);
    const [name, of] = leading(report.held_out);
    const classifies = probe.task !== "regression";
    return html`<h1>${probe.name || "Probe"}</h1>
      <p class="row">
        <a class="button main" href=${href("try", id)}>Try it</a>
        <button type="button" onClick=${() => download(`${path}/report`, `${id}.html`).catch(setError)}>Report as a page</button>
        <button type="button" onClick=${() => download(`${path}/weights`, `${id}.safetensors`).catch(setError)}>Weights</button>
      </p>
      <${Trouble} error=${error} />
      ${report.warnings.length > 0 &&
      html`<div class="warnings"><h2>Warnings</h2><ul>${report.warnings.map((words) => html`<li>${words}</li>`)}</ul></div>`}
      <${Facts} of=${[
        [`Held-out ${name}`, figure(of)],
        ["Layer", probe.layer],
        ["Estimator", probe.estimator],
        ["Task", probe.task],
        ["Classes", probe.classes.map(String).join(", ")],
        ["Rows", report.n],
        ["Extraction", probe.extraction && html`<a href=${href("extractions", probe.extraction)}>${probe.extraction}</a>`],
        ["Made", html`<${When} at=${probe.created_at} />`],
        ["Id", html`<code>${probe.id}</code>`],
      ]} />
      <div class="pictures">
        <${Picture} path=${`${path}/plots/layer_curve`} caption="Layer curve"
          alt=${`Layer curve: ${name} by layer with intervals; the best layer is ${report.best_layer}.`} />
        ${classifies && html`<${Picture} path=${`${path}/plots/reliability`} caption="Reliability"
          alt=${`Reliability diagram: predicted against observed frequency; expected calibration error ${figure(report.held_out.ece)}.`} />`}
        ${classifies && html`<${Picture} path=${`${path}/plots/roc`} caption="ROC" optional alt=${`ROC curve, ${name} ${figure(of)}.`} />`}
        ${report.confidence && html`<${Picture} path=${`${path}/plots/risk_coverage`} caption="Risk and coverage" optional alt="Risk against coverage." />`}
      </div>
      <h2>Held out</h2>
      <${Facts} of=${there.map(([shown, field]) => [shown, figure(report.held_out[field])])} />
      <details><summary>Every layer</summary>
        <${Table} caption="Scores by layer" rows=${report.layers}
          columns=${[["Layer", (row) => row.layer], ...there.map(([shown, field]) => [shown, (row) => figure(row[field])])]} />
      </details>
      <${Raw} title="Baselines" value=${report.baselines} />
      ${report.selectivity && html`<p>Selectivity: ${figure(report.selectivity.selectivity)} (${report.selectivity.metric}; chance ${number(report.selectivity.chance)}).</p>`}
      <${Raw} title="Identity" value=${probe.identity} />
      ${probe.metadata && html`<${Raw} title="Metadata" value=${probe.metadata} />`}`;
  }}<//>`;
}
