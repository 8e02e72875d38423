// The frame: key, navigation, and which view is shown.
import { get, key, onRefused } from "./api.js";
import { html, render, Trouble, useEffect, useRef, useState } from "./ui.js";
import { AdapterList, AdapterPage } from "./views/adapters.js";
import { ComparisonList, ComparisonPage } from "./views/comparisons.js";
import { DatasetList, DatasetPage } from "./views/datasets.js";
import { ExperimentList, ExperimentPage } from "./views/experiments.js";
import { ExtractionList, ExtractionPage } from "./views/extractions.js";
import { JobList, JobPage } from "./views/jobs.js";
import { ModelList } from "./views/models.js";
import { ProbeList, ProbePage } from "./views/probes.js";
import { PredictionPage, TryIt } from "./views/tryit.js";

// By the first word of the address: what the navigation calls it (null: not in it), its list, and its page of one.
const VIEWS = {
  jobs: ["Jobs", JobList, JobPage],
  models: ["Models", ModelList, ModelList],
  adapters: ["Adapters", AdapterList, AdapterPage],
  extractions: ["Extractions", ExtractionList, ExtractionPage],
  probes: ["Probes", ProbeList, ProbePage],
  try: ["Try it", TryIt, TryIt],
  comparisons: ["Comparisons", ComparisonList, ComparisonPage],
  experiments: ["Experiments", ExperimentList, ExperimentPage],
  datasets: ["Datasets", DatasetList, DatasetPage],
  predictions: [null, TryIt, PredictionPage],
};

function place() {
  const parts = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean);
  let words;
  try {
    words = parts.map(decodeURIComponent);
  } catch {
    words = [];
  }
  return Object.hasOwn(VIEWS, words[0]) ? words : ["jobs"];
}

function SignIn({ onDone, said }) {
  const [error, setError] = useState(said);
  const [busy, setBusy] = useState(false);
  const field = useRef();
  useEffect(() => field.current.focus(), []);
  const submit = async (event) => {
    event.preventDefault();
    const given = field.current.value.trim();
    if (!/^[\x21-\x7e]+$/.test(given)) {
      setError(new Error("A key has no spaces and no letters beyond ASCII."));
      return;
    }
    setBusy(true);
    key.set(given);
    try {
      onDone(await get("/v1/whoami"));
    } catch (fault) {
      key.forget();
      setError(fault);
      setBusy(false);
    }
  };
  return html`<main class="sign-in" id="main">
    <h1>Bathyscope</h1>
    <p>Hidden states and calibrated probes of fine-tuned language models.</p>
    <form onSubmit=${submit}>
      <label for="key">API key</label>
      <input id="key" ref=${field} type="password" autocomplete="off" spellcheck=${false} required aria-describedby="kept" />
      <button class="main" disabled=${busy}>Sign in</button>
      <p id="kept" class="quiet">It is kept in this tab only and forgotten when the tab closes.</p>
    </form>
    <${Trouble} error=${error} />
    <p><a href="/docs">API documentation</a></p>
  </main>`;
}

function App() {
  const [who, setWho] = useState(undefined); // undefined: not known yet; null: sign in
  const [said, setSaid] = useState(null);
  const [words, setWords] = useState(place);
  const main = useRef();

  useEffect(() => {
    onRefused(() => {
      if (key.get()) setSaid(new Error("The service does not take this key any more."));
      key.forget();
      setWho(null);
    });
    get("/v1/whoami")
      .then(setWho)
      .catch((error) => {
        if (error.status !== 401) setSaid(error);
        setWho(null);
      });
    const moved = () => {
      setWords(place());
      main.current?.focus();
      scrollTo(0, 0);
    };
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);

  const [title, List, One] = VIEWS[words[0]];
  useEffect(() => {
    document.title = who ? `${title || "Prediction"} · Bathyscope` : "Bathyscope";
  }, [title, who]);

  if (who === undefined) return html`<p class="page" role="status">Loading…</p>`;
  if (who === null) return html`<${SignIn} said=${said} onDone=${(found) => (setSaid(null), setWho(found))} />`;
  const id = words.slice(1).join("/");
  const leave = () => {
    key.forget();
    setSaid(null);
    setWho(null);
  };
  return html`<a class="skip" href="#main" onClick=${(event) => (event.preventDefault(), main.current.focus())}>To the content</a>
    <header>
      <a class="mark" href="#/jobs">Bathyscope</a>
      <nav aria-label="Views">
        ${Object.entries(VIEWS).map(
          ([word, [name]]) =>
            name && html`<a href=${"#/" + word} aria-current=${word === words[0] ? "page" : undefined}>${name}</a>`,
        )}
      </nav>
      <p class="who">
        <span title=${who.id}>${who.name}</span>
        ${key.get() && html` <button type="button" class="link" onClick=${leave}>Forget key</button>`}
      </p>
    </header>
    <main id="main" class="page" tabindex="-1" ref=${main}>
      <${id ? One : List} key=${words.join("/")} id=${id} who=${who} />
    </main>
    <footer class="page quiet"><a href="/docs">API documentation</a></footer>`;
}

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
