// Experiments: a study from one file, its stages and what came of them.
import { download, get } from "../api.js";
import { Facts, figure, href, html, leading, Listing, Loaded, number, Picture, Raw, resourceLink, Table, Trouble, useLoad, useState, When } from "../ui.js";

const COLUMNS = [
  ["Experiment", (exp) => html`<a href=${href("experiments", exp.id)}>${exp.name || exp.id.slice(0, 14) + "…"}</a>`],
  ["Stages", (exp) => exp.stages.map((stage) => stage.name).join(", ")],
  ["Reused", (exp) => `${exp.stages.filter((stage) => stage.reused).length} of ${exp.stages.length}`],
  ["Made", (exp) => html`<${When} at=${exp.created_at} />`],
];

export const ExperimentList = () => html`<h1>Experiments</h1>
  <${Listing} path="/v1/experiments" columns=${COLUMNS} caption="Experiments, newest first" empty="No experiments yet: bathyscope run config.yaml starts one." />`;

export function ExperimentPage({ id }) {
  const path = `/v1/experiments/${encodeURIComponent(id)}`;
  const found = useLoad((signal) => get(path, signal), [id]);
  const [error, setError] = useState(null);
  const made = (stage) => {
    const link = resourceLink(stage.resource);
    return link ? html`<a href=${link}>Open<span class="unseen"> what ${stage.name} made</span></a>` : "";
  };
  return html`<${Loaded} of=${found}>${(exp) => html`
    <h1>${exp.name || "Experiment"}</h1>
    <p class="row"><button type="button" onClick=${() => download(`${path}/report`, `${id}.html`).catch(setError)}>Report as a page</button></p>
    <${Trouble} error=${error} />
    ${exp.notices.length > 0 && html`<div class="warnings"><h2>Notices</h2><ul>${exp.notices.map((words) => html`<li>${words}</li>`)}</ul></div>`}
    <${Facts} of=${[
      ["Layers", exp.layers.join(", ")],
      ["Made", html`<${When} at=${exp.created_at} />`],
      ["Job", html`<a href=${href("jobs", exp.job)}>${exp.job}</a>`],
      ["Id", html`<code>${exp.id}</code>`],
    ]} />
    <h2>Stages</h2>
    <${Table} caption="Stages" rows=${exp.stages} columns=${[
      ["Stage", (stage) => stage.name],
      ["Done", (stage) => (stage.reused ? "reused" : "anew")],
      ["", made],
    ]} />
    <h2>Results</h2>
    <${Table} caption="Results" rows=${exp.results.map((one) => ({ ...one, id: one.variant }))} columns=${[
      ["Variant", (one) => one.variant],
      ["Probe", (one) => html`<a href=${href("probes", one.probe)}>layer ${one.layer}</a>`],
      ["Held out", (one) => { const [name, of] = leading(one.held_out); return `${name} ${figure(of)}`; }],
      ["Warnings", (one) => (one.warnings.length ? number(one.warnings.length) : "")],
    ]} />
    ${exp.differences && html`<h2>Adapter minus base</h2><${Table} caption="Adapter minus base, with 95 % intervals" rows=${Object.entries(exp.differences).map(([name, of]) => ({ id: name, of }))} columns=${[
      ["Figure", (one) => one.id.replaceAll("_", " ")],
      ["Difference", (one) => figure(one.of)],
    ]} />`}
    <div class="pictures">
      <${Picture} path=${`${path}/plots/layer_curve`} caption="Layer curves" optional alt="Each variant's score by layer, with intervals." />
      ${exp.transfer && html`<${Picture} path=${`${path}/plots/transfer`} caption="Transfer" optional alt="What a probe trained on base or adapter is worth on the other." />`}
      ${exp.relative_change && html`<${Picture} path=${`${path}/plots/layer_shift`} caption="Layer shift" optional alt="How far the adapter moved the states, by layer." />`}
    </div>
    <${Raw} title="Configuration" value=${exp.config} />
    <${Raw} title="Digests" value=${exp.digests} />
    <${Raw} title="Versions" value=${exp.versions} />`}<//>`;
}
