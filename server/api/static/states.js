// The tree of saved states: save the text as it stands, go on from any of them, rename and delete them.
//
// The server knows a state's id, name and length. Which text stands behind it, this page remembers in localStorage,
// for each API key apart. A state is a child of the one whose text is its longest beginning.
"use strict";

const STATES_EVERY_MS = 30000;
const MARK_AFTER_MS = 300;
const LONGEST_TEXT = 200000;
const [tree, base, nameField] = ["tree", "base", "name"].map(byId);
let states = new Map(); // id -> what the server told of it last; states that are gone stay as long as their text is known
let baseId = null; // id of the state that the text goes on from
let drawn = ""; // the tree as it is shown
let marking = 0; // timer

// What the page remembers: id -> { name, tokens, root, text }. `text` is all that stands behind `root`, the id of a
// state whose own text is not known, or null.

function memory() {
  let digest = 0x811c9dc5; // FNV-1a: keeps the trees of different keys apart, and is no secret
  for (const char of sessionStorage.getItem("key") ?? "") digest = Math.imul(digest ^ char.codePointAt(0), 0x01000193) >>> 0;
  return `gale.states.${digest.toString(16)}`;
}

function remembered() {
  try {
    return JSON.parse(localStorage.getItem(memory())) ?? {};
  } catch {
    return {};
  }
}

function keep(change) {
  const known = remembered();
  change(known);
  try {
    localStorage.setItem(memory(), JSON.stringify(known));
  } catch {
    show("The browser has no room left for this text: the state is saved, but will be shown without it.");
  }
}

// Asking the server.

async function ask(method, path, body) {
  const response = await fetch(path, { method, headers: headers(), body: body && JSON.stringify(body) });
  if (!response.ok) throw Object.assign(new Error(await failure(response)), { status: response.status });
  return response.json();
}

async function loadStates() {
  try {
    const { data } = await ask("GET", "v1/states");
    states = new Map(data.map((state) => [state.id, state]));
    byId("states").hidden = false;
    render();
  } catch (problem) {
    if ([401, 404].includes(problem.status)) byId("states").hidden = true;
  }
}

async function attempt(work) {
  show("");
  let note = "";
  try {
    note = await work();
  } catch (problem) {
    show(problem.message);
  }
  await loadStates();
  byId("note").textContent = note;
}

// Where the text stands.

function here() {
  const known = baseId && remembered()[baseId];
  if (known) return { root: known.root, text: known.text + plainText() };
  return { root: baseId, text: plainText() };
}

function nearest(place, known, except) {
  let found = null;
  for (const [id, one] of Object.entries(known)) {
    const fits = one.root === place.root && place.text.startsWith(one.text) && one.text.length > (found ? known[found].text.length : -1);
    if (fits && id !== except && !(except && one.text === place.text && id > except)) found = id;
  }
  return found ?? place.root;
}

function goOn(id) {
  if (running) return;
  remember();
  text.replaceChildren();
  if (states.has(id)) baseId = id;
  else {
    // The state is gone, but its text is not.
    const known = remembered()[id];
    baseId = known.root;
    text.textContent = known.text;
  }
  afterMoving();
  writeOn();
}

function detach() {
  if (running) return;
  remember();
  const known = remembered()[baseId];
  if (known && !known.root) text.prepend(document.createTextNode(known.text));
  text.normalize();
  baseId = null;
  afterMoving();
  writeOn();
}

function afterMoving() {
  closeCard();
  buttons();
  render();
}

function writeOn() {
  if (!matchMedia("(hover: hover)").matches) return; // a phone would bring up its keyboard
  text.focus();
  caretToEnd();
}

// Changing what is saved.

async function saveHere() {
  const name = nameField.value.trim().replace(/\s+/g, "-");
  const [prompt, place] = [plainText(), here()];
  if (!prompt && !baseId) return show("Write something first: there is nothing to save yet.");
  if (name && isTaken(name)) return show(`There is a state named ${name} already.`);
  const naming = name ? { name } : {};
  await attempt(async () => {
    const saved = prompt
      ? await ask("POST", "v1/states/prefill", { prompt, ...(baseId && { state: baseId }), ...naming })
      : await ask("POST", `v1/states/${baseId}/fork`, naming);
    keep((known) => {
      if (place.text.length <= LONGEST_TEXT) known[saved.id] = { name: saved.name, tokens: saved.num_tokens, ...place };
    });
    nameField.value = "";
    return `Saved${name ? ` as ${name}` : ""}, ${saved.num_tokens} tokens.`;
  });
}

function isTaken(name) {
  return [...states.values()].some((state) => state.name === name);
}

function rename(id, name) {
  name = name.trim().replace(/\s+/g, "-");
  if (!name || name === states.get(id).name) return;
  if (isTaken(name)) return show(`There is a state named ${name} already.`);
  return attempt(async () => {
    // States have no other way to a new name than a fork, which takes no room.
    const copy = await ask("POST", `v1/states/${id}/fork`, { name });
    await ask("DELETE", `v1/states/${id}`);
    keep((known) => {
      for (const one of Object.values(known)) if (one.root === id) one.root = copy.id;
      if (known[id]) known[copy.id] = { ...known[id], name };
      delete known[id];
    });
    if (baseId === id) baseId = copy.id;
    for (const before of history) if (before.from === id) before.from = copy.id;
    return `Renamed to ${name}.`;
  });
}

function remove(id) {
  return attempt(async () => {
    if (states.has(id)) await ask("DELETE", `v1/states/${id}`);
    if (baseId === id) detach();
    for (const before of history.filter(({ from }) => from === id)) before.from = null;
    keep((known) => delete known[id]);
    return "Deleted.";
  });
}

// Showing it.

function render() {
  const known = remembered();
  const ids = [...new Set([...states.keys(), ...Object.keys(known)])];
  const children = new Map();
  for (const id of ids) {
    const parent = known[id] ? nearest(known[id], known, id) : null;
    const under = ids.includes(parent) ? parent : null;
    children.set(under, [...(children.get(under) ?? []), id]);
  }
  const branch = (parent) => (children.get(parent) ?? []).map((id) => ({ ...shown(id, known, parent), below: branch(id) }));
  const branches = branch(null);
  // What has not changed stays, so that nothing vanishes under a finger.
  if (JSON.stringify(branches) !== drawn) {
    drawn = JSON.stringify(branches);
    tree.replaceChildren(...branches.map(drawBranch));
  }
  byId("nostates").hidden = ids.length > 0;
  markCurrent(known);
  drawBase(known[baseId]);
}

function shown(id, known, parent) {
  const [state, own] = [states.get(id), known[id]];
  const name = state?.name ?? own?.name ?? null;
  const start = parent && known[parent]?.root === own.root ? known[parent].text.length : 0;
  const size = state ? `${state.num_tokens} tokens · ${duration(state.expires - Date.now() / 1000)}` : "gone";
  return { id, name, label: name ?? own?.text.slice(start, start + 80).trim() ?? id, size, isGone: !state };
}

function drawBranch(node) {
  const item = document.createElement("li");
  item.append(drawRow(node));
  if (node.below.length) {
    const list = document.createElement("ul");
    list.append(...node.below.map(drawBranch));
    item.append(list);
  }
  return item;
}

function drawRow({ id, name, label, size, isGone }) {
  const row = document.createElement("div");
  row.className = isGone ? "state gone" : "state";
  const go = button(label, isGone ? `Write on from the text of ${label}; the state is gone` : `Go on from ${label}`, () => goOn(id));
  go.className = name ? "go named" : "go";
  go.dataset.id = id;
  const tokens = document.createElement("small");
  tokens.textContent = size;
  row.append(go, tokens);
  if (!isGone) {
    tokens.title = `Expires on ${new Date(states.get(id).expires * 1000).toLocaleString()}`;
    row.append(button("✎", `Rename ${label}`, () => edit(id, row, go)));
  }
  row.append(button("✕", `Delete ${label}`, () => remove(id)));
  return row;
}

function markCurrent(known) {
  const current = nearest(here(), known, null);
  for (const go of tree.querySelectorAll(".go")) {
    if (go.dataset.id === current) go.setAttribute("aria-current", "true");
    else go.removeAttribute("aria-current");
  }
}

function button(content, label, onClick) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = content;
  made.title = label;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", onClick);
  return made;
}

function edit(id, row, go) {
  const field = document.createElement("input");
  field.value = states.get(id)?.name ?? "";
  field.maxLength = 128;
  field.setAttribute("aria-label", "New name");
  let isOpen = true;
  const close = () => {
    if (!isOpen) return false; // taking the field away blurs it, too
    isOpen = false;
    row.replaceChild(go, field);
    return true;
  };
  field.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Escape" && close()) go.focus();
    if (event.key === "Enter" && close()) {
      go.focus();
      rename(id, field.value);
    }
  });
  field.addEventListener("blur", () => close() && rename(id, field.value));
  row.replaceChild(field, go);
  field.focus();
  field.select();
}

function drawBase(known) {
  base.hidden = baseId === null;
  if (baseId === null) return;
  const state = states.get(baseId);
  byId("basename").textContent = state?.name ?? known?.name ?? "a saved state";
  byId("basesize").textContent = state ? `${state.num_tokens} tokens` : "gone";
  const past = byId("past");
  const shown = known ? known.text : "";
  past.textContent = shown || "Its text was not written on this page.";
  past.classList.toggle("unknown", !shown);
  past.scrollTop = past.scrollHeight;
  byId("detach").textContent = known && !known.root ? "Edit its text" : "Let go";
}

function duration(seconds) {
  const [unit, length] = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]].find(([, size]) => seconds >= 2 * size) ?? ["s", 1];
  return `${Math.max(0, Math.round(seconds / length))} ${unit}`;
}

// Wiring.

byId("save").addEventListener("submit", (event) => {
  event.preventDefault();
  saveHere();
});
byId("detach").addEventListener("click", detach);
tree.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step || event.target.className.split(" ")[0] !== "go") return;
  event.preventDefault();
  const all = [...tree.querySelectorAll(".go")];
  all[all.indexOf(event.target) + step]?.focus();
});
text.addEventListener("input", () => {
  clearTimeout(marking);
  marking = setTimeout(() => markCurrent(remembered()), MARK_AFTER_MS);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "s" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    saveHere();
  }
});
document.addEventListener("visibilitychange", () => document.hidden || loadStates());
loadStates();
setInterval(() => document.hidden || document.activeElement?.closest("#tree") || loadStates(), STATES_EVERY_MS);
