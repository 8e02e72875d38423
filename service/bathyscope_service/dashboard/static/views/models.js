// Base models: which are in memory, where, how large, and what their self-test said.
import { get, work } from "../api.js";
import { Badge, Bars, bytes, Facts, html, Loaded, number, Trouble, useLoad, useState } from "../ui.js";

function Loading({ model }) {
  const [quantization, setQuantization] = useState(model.quantizations[0]);
  const [said, setSaid] = useState("");
  const [error, setError] = useState(null);
  const go = async (verb) => {
    setError(null);
    try {
      const path = `/v1/models/${model.name.split("/").map(encodeURIComponent).join("/")}/${verb}`;
      await work(path, { quantization }, (job) => setSaid(`${verb}: ${job.status}`));
    } catch (fault) {
      setError(fault);
      setSaid("");
    }
  };
  return html`<p class="row">
      <label>As${" "}
        <select value=${quantization} onChange=${(event) => setQuantization(event.target.value)}>
          ${model.quantizations.map((word) => html`<option value=${word}>${word}</option>`)}
        </select>
      </label>
      <button type="button" onClick=${() => go("load")}>Load</button>
      <button type="button" onClick=${() => go("unload")}>Unload</button>
      <span class="quiet" role="status">${said}</span>
    </p>
    <${Trouble} error=${error} />`;
}

function Card({ model, admin }) {
  const test = model.self_test;
  return html`<section class="card">
    <h2>${model.name} <${Badge}>${model.residency}<//></h2>
    <${Facts} of=${[
      ["Architecture", model.architecture],
      ["Blocks", model.num_layers],
      ["Width", model.hidden_size],
      ["Longest text", model.max_length && `${number(model.max_length)} tokens`],
      ["Source", model.source],
      ["Quantizations", model.quantizations.join(", ")],
      ["Memory", model.memory_bytes && bytes(model.memory_bytes)],
    ]} />
    ${model.variants.length > 0 &&
    html`<ul class="plain">
      ${model.variants.map(
        (held) => html`<li>
          <${Badge}>${held.state}<//> on ${held.worker}, ${held.device}: ${held.quantization === "none" ? "unquantized" : held.quantization}, ${held.compute_dtype}, ${bytes(held.memory_bytes)}${held.fraction_quantized ? `, ${number(held.fraction_quantized * 100, 0)} % quantized` : ""}
        </li>`,
      )}
    </ul>`}
    ${test &&
    html`<details>
      <summary>Self-test ${test.passed ? "passed" : "failed"}: largest relative error ${number(test.max_relative_error)}</summary>
      <p class="quiet">A text alone against the same text in a padded batch, layer by layer.</p>
      <${Bars} values=${test.layers.map((layer) => layer.relative_error)} label=${`Relative error by layer, at most ${number(test.max_relative_error)}`} />
    </details>`}
    ${admin && html`<${Loading} model=${model} />`}
  </section>`;
}

export function ModelList({ id, who }) {
  const list = useLoad((signal) => get("/v1/models?limit=200", signal), [], 5000);
  return html`<h1>Models</h1>
    <${Loaded} of=${list}>${(page) => {
      const shown = id ? page.data.filter((model) => model.name === id) : page.data;
      return html`<div class="cards">
        ${shown.map((model) => html`<${Card} key=${model.name} model=${model} admin=${who.scopes.includes("admin")} />`)}
      </div>`;
    }}<//>`;
}
