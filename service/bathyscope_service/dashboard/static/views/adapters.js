// Adapters: where they came from, what their conversion did, and how far they move each layer.
import { download, get, work } from "../api.js";
import { Bars, bytes, Facts, href, html, Listing, Loaded, number, Raw, Short, Table, Trouble, useLoad, useState, When } from "../ui.js";

const effect = (adapter) => {
  if (!adapter.effect) return "–";
  return adapter.effect.is_noop ? "none: it changes nothing" : `up to ${number(adapter.effect.max)}`;
};

/** The modules by their last word, which all blocks share. */
function modules(names) {
  const kinds = [...new Set(names.map((name) => name.split(".").pop()))];
  return `${kinds.slice(0, 12).join(", ")}${kinds.length > 12 ? ", …" : ""} (${names.length} in all)`;
}

const COLUMNS = [
  ["Adapter", (ad) => html`<a href=${href("adapters", ad.id)}>${ad.name || ad.id}</a>`],
  ["Base", (ad) => ad.base_model],
  ["Rank", (ad) => ad.rank],
  ["Effect", effect],
  ["Tensors", (ad) => `${number(ad.tensors.applied)} of ${number(ad.tensors.read)}`],
  ["Made", (ad) => html`<${When} at=${ad.created_at} />`],
];

function Add() {
  const [fields, setFields] = useState({ source: "", name: "", base_model: "" });
  const [said, setSaid] = useState("");
  const [error, setError] = useState(null);
  const submit = async (event) => {
    event.preventDefault();
    setError(null);
    try {
      const body = Object.fromEntries(Object.entries(fields).filter(([, value]) => value.trim()));
      const job = await work("/v1/adapters", body, (now) => setSaid(`${now.status}${now.progress.stage ? `: ${now.progress.stage}` : ""}`));
      location.hash = href("adapters", job.resource.split("/").pop());
    } catch (fault) {
      setError(fault);
      setSaid("");
    }
  };
  const field = (name, label, hint, required) => html`<div class="field">
    <label for=${name}>${label}</label>
    <input id=${name} value=${fields[name]} placeholder=${hint} required=${required} spellcheck=${false}
      onInput=${(event) => setFields({ ...fields, [name]: event.target.value })} />
  </div>`;
  return html`<details class="form">
    <summary>Fetch an adapter</summary>
    <form onSubmit=${submit}>
      ${field("source", "Source", "tinker://RUN/sampler_weights/NAME or hf://ORG/REPO", true)}
      ${field("base_model", "Base model (where the source does not say)", "smollm2")}
      ${field("name", "Name (optional)", "")}
      <p class="row"><button class="main">Fetch</button> <span role="status" class="quiet">${said}</span></p>
      <${Trouble} error=${error} />
    </form>
  </details>`;
}

export const AdapterList = () => html`<h1>Adapters</h1>
  <${Add} />
  <${Listing} path="/v1/adapters" columns=${COLUMNS} caption="Adapters, newest first" empty="No adapters yet." />`;

export function AdapterPage({ id }) {
  const found = useLoad((signal) => get(`/v1/adapters/${encodeURIComponent(id)}`, signal), [id]);
  return html`<${Loaded} of=${found}>${(ad) => html`
    <h1>${ad.name || ad.id}</h1>
    <${Facts} of=${[
      ["Id", html`<code>${ad.id}</code>`],
      ["Source", ad.source || "upload"],
      ["Base model", ad.base_model],
      ["Format", ad.format],
      ["Rank", ad.rank],
      ["Alpha", ad.alpha],
      ["Tensors applied", `${number(ad.tensors.applied)} of ${number(ad.tensors.read)}`],
      ["Size", bytes(ad.bytes)],
      ["Digest", html`<${Short} of=${ad.digest} />`],
      ["Changes", modules(ad.target_modules)],
      ["Made", html`<${When} at=${ad.created_at} />`],
    ]} />
    <h2>Effect</h2>
    ${ad.effect
      ? html`<p>${ad.effect.is_noop
            ? "It changes nothing: neither the states of any layer nor what the output head makes of the last."
            : `Norm of the difference over norm of the base's states, by layer from the embeddings on; at most ${number(ad.effect.max)}.`}</p>
          <${Bars} values=${ad.effect.relative_change} label=${`Relative change by layer, at most ${number(ad.effect.max)}`} />
          <details><summary>Numbers</summary>
            <${Table} caption="Relative change by layer" columns=${[["Layer", (row) => row.layer], ["Relative change", (row) => number(row.value)]]}
              rows=${ad.effect.relative_change.map((value, layer) => ({ layer, value }))} />
          </details>`
      : html`<p class="quiet">Not measured.</p>`}
    <h2>Conversion</h2>
    ${ad.conversion.length > 0
      ? html`<ul>${ad.conversion.map((note) => html`<li>${note}</li>`)}</ul>`
      : html`<p class="quiet">Nothing had to be dropped, repaired or renamed.</p>`}
    <p class="row"><button type="button" onClick=${() => download(`/v1/adapters/${encodeURIComponent(ad.id)}/archive`, `${ad.id}.tar`)}>Download as PEFT folder</button></p>
    ${ad.metadata && html`<${Raw} title="Metadata" value=${ad.metadata} />`}`}<//>`;
}
