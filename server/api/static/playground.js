// The playground: one text that a person and the model write in turn. It speaks the server's public API alone.
"use strict";

const ALTERNATIVES = 5;
const FIGURES_EVERY_MS = 2000;
const byId = (id) => document.getElementById(id);
const [text, card, go, stop, undo, again, error] = ["text", "card", "go", "stop", "undo", "again", "error"].map(byId);
let running = null; // AbortController of the answer that is being streamed
const history = []; // before each continuation: the text's HTML and the state that it goes on from

// Asking the server.

function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function failure(response) {
  if (response.status === 401) byId("keyrow").hidden = false;
  const body = await response.text();
  try {
    return JSON.parse(body).error.message;
  } catch {
    return `${response.status}: ${body.slice(0, 200)}`;
  }
}

async function* events(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the stream ended without [DONE]");
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

function settings() {
  const values = { max_tokens: 64 };
  for (const input of byId("settings").elements) {
    if (input.type === "checkbox" || input.value === "") continue;
    values[input.name] = input.name === "stop" ? JSON.parse(`"${input.value.replaceAll('"', '\\"')}"`) : Number(input.value);
  }
  return values;
}

// Writing.

function plainText() {
  return text.innerText.replace(/\u00a0/g, " ").replace(/\n$/, "");
}

function caretToEnd() {
  const selection = getSelection();
  selection.selectAllChildren(text);
  selection.collapseToEnd();
}

function remember() {
  history.push({ html: text.innerHTML, from: baseId });
  if (history.length > 100) history.shift();
}

function addTokens(logprobs, piece) {
  // Held-back text comes with its last token: so one span may stand for several tokens, and shows the first one's.
  if (!piece) return;
  const span = document.createElement("span");
  span.className = "token";
  span.textContent = piece;
  if (logprobs && logprobs.tokens.length) {
    const probability = Math.exp(logprobs.token_logprobs[0]);
    span.dataset.token = logprobs.tokens[0];
    span.dataset.top = JSON.stringify(logprobs.top_logprobs[0]);
    span.style.setProperty("--doubt", (0.45 * (1 - probability)).toFixed(3));
  }
  text.append(span);
  text.scrollTop = text.scrollHeight;
}

async function continueText({ remembered = false } = {}) {
  if (running) return;
  const prompt = plainText();
  show(prompt || baseId ? "" : "Write something first.");
  if (!prompt && !baseId) return text.focus();
  closeCard();
  if (!remembered) remember();
  running = new AbortController();
  buttons();
  const sent = performance.now();
  let first = 0, count = 0;
  try {
    const body = {
      ...settings(), model: byId("model").value || undefined, prompt, ...(baseId && { state: baseId }), stream: true,
      logprobs: ALTERNATIVES, stream_options: { include_usage: true },
    };
    const response = await fetch("v1/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const chunk of events(response)) {
      if (chunk.usage) {
        const cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
        byId("tokens").textContent = `${chunk.usage.prompt_tokens} + ${chunk.usage.completion_tokens}`;
        byId("cached").textContent = `${cached}`;
      }
      const choice = chunk.choices[0];
      if (!choice) continue;
      const now = performance.now();
      first ||= now;
      count += choice.logprobs?.tokens.length ?? 0;
      addTokens(choice.logprobs, choice.text);
      byId("ttft").textContent = `${Math.round(first - sent)} ms`;
      if (count > 1 && now > first) byId("rate").textContent = `${Math.round(((count - 1) * 1000) / (now - first))} tokens/s`;
    }
  } catch (problem) {
    if (problem.name !== "AbortError") show(problem.message);
  }
  running = null;
  if (document.activeElement === text) caretToEnd();
  afterMoving();
}

function takeBack() {
  if (!history.length || running) return false;
  const before = history.pop();
  text.innerHTML = before.html;
  baseId = before.from;
  afterMoving();
  return true;
}

function show(message) {
  error.textContent = message;
  error.hidden = !message;
  byId("note").textContent = "";
}

function buttons() {
  go.disabled = running !== null;
  stop.disabled = running === null;
  undo.disabled = again.disabled = running !== null || !history.length;
}

// What else was likely.

function closeCard() {
  card.hidden = true;
  text.querySelectorAll(".chosen").forEach((token) => token.classList.remove("chosen"));
}

function openCard(token) {
  closeCard();
  if (!token.dataset.top) return;
  token.classList.add("chosen");
  const top = Object.entries(JSON.parse(token.dataset.top)).sort((a, b) => b[1] - a[1]);
  card.replaceChildren(...top.map(([name, logprob]) => {
    const share = `${(Math.exp(logprob) * 100).toFixed(1)}%`;
    const button = document.createElement("button");
    button.type = "button";
    button.style.setProperty("--share", share);
    button.className = name === token.dataset.token ? "own" : "";
    const code = document.createElement("code");
    code.textContent = name.replace(/\n/g, "↵").replace(/ /g, "·") || "(end)";
    const number = document.createElement("span");
    number.textContent = share;
    button.append(code, number);
    button.disabled = name.startsWith("bytes:");
    button.addEventListener("click", () => branch(token, name));
    return button;
  }));
  card.hidden = false;
  const place = token.getClientRects()[0];
  const left = Math.min(place.left, document.documentElement.clientWidth - card.offsetWidth - 8);
  card.style.left = `${Math.max(8, left) + window.scrollX}px`;
  card.style.top = `${place.bottom + window.scrollY + 4}px`;
}

function branch(token, name) {
  if (running) return;
  remember();
  while (token.nextSibling) token.nextSibling.remove();
  token.replaceWith(document.createTextNode(name));
  text.normalize();
  closeCard();
  continueText({ remembered: true });
}

function walk(step) {
  const tokens = [...text.querySelectorAll(".token")];
  if (!tokens.length) return;
  const now = tokens.findIndex((token) => token.classList.contains("chosen"));
  const next = now < 0 ? (step > 0 ? 0 : tokens.length - 1) : Math.min(Math.max(now + step, 0), tokens.length - 1);
  openCard(tokens[next]);
  tokens[next].scrollIntoView({ block: "nearest" });
}

// Figures of the server.

async function refresh() {
  if (document.hidden) return;
  try {
    const response = await fetch("metrics", { headers: headers() });
    if (!response.ok) return;
    const body = await response.text();
    const value = (name) => Number(body.match(new RegExp(`^${name} (\\S+)$`, "m"))?.[1]);
    const [used, all] = [value("gale_slots_used"), value("gale_slots_capacity")];
    byId("slots").textContent = Number.isFinite(all) ? `${used} of ${all}` : "–";
    byId("status").textContent = value("gale_engine_ready") ? "ready" : "the engine is not ready";
  } catch {
    byId("status").textContent = "the server does not answer";
  }
}

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) return show(await failure(response));
  const { data } = await response.json();
  byId("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
  show("");
}

// Wiring.

go.addEventListener("click", () => continueText());
stop.addEventListener("click", () => running?.abort());
undo.addEventListener("click", takeBack);
again.addEventListener("click", () => takeBack() && continueText());
byId("key").addEventListener("change", (event) => {
  sessionStorage.setItem("key", event.target.value);
  loadModels();
  loadStates();
});
byId("settings").addEventListener("submit", (event) => event.preventDefault());
byId("settings").elements.colour.addEventListener("change", (event) => text.classList.toggle("shaded", event.target.checked));
text.classList.add("shaded");
text.addEventListener("mouseover", (event) => event.target.classList.contains("token") && !running && openCard(event.target));
text.addEventListener("click", (event) => event.target.classList.contains("token") && openCard(event.target));
text.addEventListener("input", closeCard);
text.addEventListener("paste", (event) => {
  event.preventDefault();
  document.execCommand("insertText", false, event.clipboardData.getData("text/plain"));
});
document.addEventListener("click", (event) => {
  if (!card.contains(event.target) && !event.target.classList?.contains("token")) closeCard();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    continueText();
  } else if (event.key === "Escape") {
    running ? running.abort() : closeCard();
  } else if (event.altKey && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
    event.preventDefault();
    walk(event.key === "ArrowRight" ? 1 : -1);
  }
});
loadModels();
refresh();
setInterval(refresh, FIGURES_EVERY_MS);
