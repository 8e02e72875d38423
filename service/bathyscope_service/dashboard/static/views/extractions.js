// Extractions: start one, watch it, read what was made.
import { download, get, work } from "../api.js";
import { Badge, Bars, bytes, Facts, href, html, Listing, Loaded, number, Progress, Raw, Short, Trouble, useLoad, useState, When } from "../ui.js";

const COLUMNS = [
  ["Extraction", (ext) => html`<a href=${href("extractions", ext.id)}><code>${ext.id.slice(0, 14)}…</code></a>`],
  ["Model", (ext) => ext.model],
  ["Adapter", (ext) => (ext.variants ? `${ext.variants.length} variants` : ext.adapter ? html`<${Short} of=${ext.adapter} />` : "base")],
  ["Shape", (ext) => ext.shape.join(" × ")],
  ["Pooling", (ext) => ext.pooling],
  ["Size", (ext) => bytes(ext.bytes)],
  ["Made", (ext) => html`<${When} at=${ext.created_at} />`],
];

/** `all`, `every:4`, or numbers with commas. */
function layersOf(text) {
  const words = text.trim();
  if (words === "all" || words.startsWith("every:")) return words;
  const numbers = words.split(/[\s,]+/).filter(Boolean).map(Number);
  if (numbers.length === 0 || numbers.some((n) => !Number.isInteger(n))) {
    throw new Error("Layers are all, every:4, or whole numbers with commas such as 8, 16, -1.");
  }
  return numbers;
}

function Start() {
  const models = useLoad((signal) => get("/v1/models?limit=200", signal), []);
  const adapters = useLoad((signal) => get("/v1/adapters?limit=200", signal), []);
  const [fields, setFields] = useState({ model: "", adapter: "", texts: "", layers: "every:4", pooling: "last", quantization: "none" });
  const [job, setJob] = useState(null);
  const [error, setError] = useState(null);
  const offered = models.value ? models.value.data : [];
  const model = offered.find((one) => one.name === fields.model) || offered[0];
  const set = (name) => (event) => setFields({ ...fields, [name]: event.target.value });
  const busy = job !== null && !["succeeded", "failed", "cancelled", "expired"].includes(job.status);

  const submit = async (event) => {
    event.preventDefault();
    setError(null);
    try {
      const inputs = fields.texts.split("\n").filter((line) => line.trim());
      if (inputs.length === 0) throw new Error("Give at least one text, each on a line of its own.");
      const body = { model: model.name, inputs, layers: layersOf(fields.layers), pooling: fields.pooling };
      if (fields.quantization !== "none") body.quantization = fields.quantization;
      if (fields.adapter) body.adapter = fields.adapter.startsWith("pair:") ? ["base", fields.adapter.slice(5)] : fields.adapter;
      await work("/v1/extractions", body, setJob);
    } catch (fault) {
      setError(fault);
    }
  };
  const fitting = (adapters.value ? adapters.value.data : []).filter((ad) => model && ad.base_model === model.name);
  const select = (name, label, options) => html`<div class="field">
    <label for=${name}>${label}</label>
    <select id=${name} value=${fields[name] || options[0]?.[0]} onChange=${set(name)}>
      ${options.map(([value, shown]) => html`<option value=${value}>${shown}</option>`)}
    </select>
  </div>`;
  const same = (words) => words.map((word) => [word, word]);
  return html`<section class="card">
    <h2>Start one</h2>
    <form onSubmit=${submit} aria-label="Start an extraction">
      <div class="fields">
        ${select("model", "Model", same(offered.map((one) => one.name)))}
        ${select("adapter", "Adapter", [
          ["", "none: the base model"],
          ...fitting.map((ad) => [ad.id, ad.name || ad.id]),
          ...fitting.map((ad) => [`pair:${ad.id}`, `base and ${ad.name || ad.id}`]),
        ])}
        ${select("quantization", "Quantization", same(model ? model.quantizations : ["none"]))}
        ${select("pooling", "Pooling", same(["last", "mean", "max", "first", "none"]))}
        <div class="field">
          <label for="layers">Layers</label>
          <input id="layers" value=${fields.layers} onInput=${set("layers")} spellcheck=${false} aria-describedby="layers-hint" />
          <small id="layers-hint" class="quiet">all, every:4, or 8, 16, -1</small>
        </div>
      </div>
      <div class="field">
        <label for="texts">Texts, each on a line of its own</label>
        <textarea id="texts" rows="4" value=${fields.texts} onInput=${set("texts")} required></textarea>
      </div>
      <p class="row" aria-live="polite">
        <button class="main" disabled=${busy || !model}>Extract</button>
        ${job && html`<${Badge}>${job.status}<//> <${Progress} job=${job} />`}
        ${job && job.resource && html`<a href=${href("extractions", job.resource.split("/").pop())}>Open it</a>`}
        ${job && html`<a href=${href("jobs", job.id)}>Its job</a>`}
      </p>
      <${Trouble} error=${error || models.error} />
    </form>
  </section>`;
}

export const ExtractionList = () => html`<h1>Extractions</h1>
  <${Start} />
  <h2>Made</h2>
  <${Listing} path="/v1/extractions" columns=${COLUMNS} caption="Extractions, newest first" empty="No extractions yet." every=${4000} />`;

export function ExtractionPage({ id }) {
  const found = useLoad((signal) => get(`/v1/extractions/${encodeURIComponent(id)}`, signal), [id]);
  const [error, setError] = useState(null);
  const fetchAs = (format, ext) => () =>
    download(`/v1/extractions/${encodeURIComponent(id)}/hidden_states?format=${format}`, `${id}.${ext}`).catch(setError);
  return html`<${Loaded} of=${found}>${(ext) => html`
    <h1>Extraction</h1>
    <${Facts} of=${[
      ["Id", html`<code>${ext.id}</code>`],
      ["Model", ext.model],
      ["Adapter", ext.variants ? null : ext.adapter ? html`<a href=${href("adapters", ext.adapter)}>${ext.adapter}</a>` : "base"],
      ["Shape", ext.shape.join(" × ")],
      ["Type", ext.dtype],
      ["Layers", ext.layers.join(", ")],
      ["Pooling", ext.pooling],
      ["Texts", number(ext.inputs)],
      ["Tokens", number(ext.tokens.total)],
      ["From the cache", `${number(ext.cache_hits)} rows`],
      ["Size", bytes(ext.bytes)],
      ["SHA-256", html`<${Short} of=${ext.sha256} />`],
      ["Made", html`<${When} at=${ext.created_at} />`],
      ["Job", html`<a href=${href("jobs", ext.job)}>${ext.job}</a>`],
    ]} />
    ${ext.variants &&
    html`<h2>Variants</h2>
      ${ext.variants.map((variant, i) => html`<section>
        <p>${variant.adapter ? html`<a href=${href("adapters", variant.adapter)}>${variant.adapter}</a>` : "base"}
          ${i > 0 && ext.relative_change && ": relative change from the first, by layer"}</p>
        ${i > 0 && ext.relative_change && html`<${Bars} values=${ext.relative_change[i]} label="Relative change by layer" />`}
      </section>`)}`}
    <h2>Download</h2>
    <p class="row">
      <button type="button" onClick=${fetchAs("safetensors", "safetensors")}>safetensors</button>
      ${ext.dtype !== "bfloat16" && html`<button type="button" onClick=${fetchAs("npy", "npy")}>npy</button>
        <button type="button" onClick=${fetchAs("arrow", "arrow")}>arrow</button>`}
    </p>
    <${Trouble} error=${error} />
    <${Raw} title="Identity: what another extraction must share to be comparable" value=${ext.identity} />
    ${ext.metadata && html`<${Raw} title="Metadata" value=${ext.metadata} />`}`}<//>`;
}
