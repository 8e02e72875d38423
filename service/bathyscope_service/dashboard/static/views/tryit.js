// A text, and what a probe says of each of its tokens.
import { get, work } from "../api.js";
import { href, html, leading, Loaded, number, Trouble, useEffect, useLoad, useRef, useState } from "../ui.js";

/** The text cut where tokens begin and end: `[{text, token}]`, `token` null for what belongs to none. Offsets count
 * code points, and tokens of one letter's bytes may share theirs. */
function pieces(text, tokens) {
  const letters = Array.from(text);
  const found = [];
  let at = 0;
  for (const token of tokens) {
    if (token.start === null || token.end === null) {
      found.push({ text: token.special ? "" : token.text || "", token });
      continue;
    }
    if (token.start > at) found.push({ text: letters.slice(at, token.start).join(""), token: null });
    found.push({ text: letters.slice(Math.max(at, token.start), token.end).join(""), token });
    at = Math.max(at, token.end);
  }
  if (at < letters.length) found.push({ text: letters.slice(at).join(""), token: null });
  return found;
}

// Blue below the middle, orange above it: told apart by all, and light enough for the text over them.
function colour(share) {
  const strength = Math.min(1, Math.abs(share - 0.5) * 2) * 0.62;
  return share < 0.5 ? `rgba(0, 114, 178, ${strength})` : `rgba(230, 140, 0, ${strength})`;
}

export function HeatMap({ text, tokens, classes, task }) {
  const many = Array.isArray(tokens[0]?.score);
  const [chosen, setChosen] = useState(0);
  const [at, setAt] = useState(0);
  const box = useRef();
  const score = (token) => (many ? token.score[chosen] : token.score);
  const all = tokens.map(score);
  const [low, high] = task === "regression" ? [Math.min(...all), Math.max(...all)] : [0, 1];
  const share = (token) => (high > low ? (score(token) - low) / (high - low) : 0.5);
  const current = tokens[Math.min(at, tokens.length - 1)];
  const of = task === "regression" ? "value" : `P(${many ? classes[chosen] : classes[classes.length - 1]})`;
  const move = (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(tokens.length - 1, to));
    setAt(next);
    box.current.querySelector(`[data-at="${next}"]`)?.focus();
  };
  return html`<div class="heat">
    ${many && html`<label>Class${" "}
      <select value=${chosen} onChange=${(event) => setChosen(Number(event.target.value))}>
        ${classes.map((name, i) => html`<option value=${i}>${String(name)}</option>`)}
      </select></label>`}
    <p class="tokens" ref=${box} role="group" aria-label="Tokens and their scores; arrow keys move" onKeyDown=${move}>
      ${pieces(text, tokens).map(({ text: words, token }) => {
        if (!token) return words;
        const i = tokens.indexOf(token);
        return html`<span class=${"token" + (words ? "" : " mark")} data-at=${i} tabindex=${i === at ? 0 : -1}
          style=${{ backgroundColor: colour(share(token)) }} title=${`${of} = ${number(score(token))}`}
          aria-label=${`${words || token.text || "token"}: ${number(score(token))}`}
          onFocus=${() => setAt(i)} onMouseEnter=${() => setAt(i)}>${words || "·"}</span>`;
      })}
    </p>
    <p class="scale"><span>${number(low, 1)}</span><span class="bar" aria-hidden="true"></span><span>${number(high, 1)}</span>
      <output aria-live="polite">${current && html`<code>${JSON.stringify(current.text || "")}</code> ${of} = ${number(score(current))}`}</output></p>
  </div>`;
}

function Reading({ prediction, row, text }) {
  const label = prediction.labels[row];
  const chances = prediction.probabilities ? prediction.probabilities[row] : null;
  const words = (prediction.rendered && prediction.rendered[row]) ?? text;
  const tokens = prediction.tokens ? prediction.tokens[row] : null;
  return html`<section class="card reading">
    <p>The probe says <strong>${String(label)}</strong>.
      ${chances && html`<span class="quiet"> ${prediction.classes.map((name, i) => `${name}: ${number(chances[i])}`).join(", ")}</span>`}</p>
    ${tokens && tokens.length > 0
      ? html`<${HeatMap} text=${words ?? tokens.map((token) => token.text || "").join("")} tokens=${tokens}
          classes=${prediction.classes} task=${prediction.task} />`
      : html`<p>${words}</p>`}
  </section>`;
}

export function TryIt({ id }) {
  const probes = useLoad((signal) => get("/v1/probes?limit=100", signal), []);
  const [chosen, setChosen] = useState(id);
  const [text, setText] = useState("The capital of France is Paris.");
  const [said, setSaid] = useState("");
  const [error, setError] = useState(null);
  const [result, setResult] = useState(null);
  const stop = useRef(new AbortController());
  useEffect(() => () => stop.current.abort(), []);
  const submit = async (event, probe) => {
    event.preventDefault();
    stop.current.abort();
    stop.current = new AbortController();
    const { signal } = stop.current;
    setError(null);
    setSaid("asking");
    try {
      const path = `/v1/probes/${encodeURIComponent(probe)}/predict`;
      const job = await work(path, { inputs: [text], per_token: true }, (now) => signal.aborted || setSaid(now.status), signal);
      const prediction = await get(job.resource, signal);
      if (!signal.aborted) setResult({ prediction, text });
    } catch (fault) {
      if (!signal.aborted) setError(fault);
    }
    if (!signal.aborted) setSaid("");
  };
  return html`<h1>Try it</h1>
    <${Loaded} of=${probes}>${(page) => {
      if (page.data.length === 0) return html`<p class="quiet">Train a probe first: POST /v1/probes.</p>`;
      const probe = chosen || page.data[0].id;
      return html`<form onSubmit=${(event) => submit(event, probe)} aria-label="Try a probe">
        <div class="field"><label for="probe">Probe</label>
          <select id="probe" value=${probe} onChange=${(event) => (setChosen(event.target.value), setResult(null))}>
            ${page.data.map((one) => {
              const [name, of] = leading(one.report.held_out);
              return html`<option value=${one.id}>${`${one.name || one.id}, layer ${one.layer}, ${name} ${of ? number(of.value) : "–"}`}</option>`;
            })}
            ${!page.data.some((one) => one.id === probe) && html`<option value=${probe}>${probe}</option>`}
          </select></div>
        <div class="field"><label for="text">Text</label>
          <textarea id="text" rows="3" required value=${text} onInput=${(event) => setText(event.target.value)}></textarea></div>
        <p class="row"><button class="main" disabled=${said !== ""}>Read it</button> <span role="status" class="quiet">${said}</span></p>
      </form>
      <${Trouble} error=${error} />
      ${result && html`<${Reading} key=${result.prediction.id} prediction=${result.prediction} row=${0} text=${result.text} />
        <p><a href=${href("predictions", result.prediction.id)}>This prediction</a></p>`}`;
    }}<//>`;
}

const MOST = 50;

export function PredictionPage({ id }) {
  const found = useLoad((signal) => get(`/v1/predictions/${encodeURIComponent(id)}`, signal), [id]);
  return html`<h1>Prediction</h1>
    <${Loaded} of=${found}>${(prediction) => html`
      <p>By <a href=${href("probes", prediction.probe)}>${prediction.probe}</a>.</p>
      ${prediction.labels.slice(0, MOST).map((_, row) => html`<${Reading} prediction=${prediction} row=${row} text=${null} />`)}
      ${prediction.labels.length > MOST && html`<p class="quiet">And ${number(prediction.labels.length - MOST)} more.</p>`}`}<//>`;
}
