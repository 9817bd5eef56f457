// The chat: what is on the page, and what its controls do.

import { Answer } from "./answer.js";
import { Failure, apiKey, listModels, streamChat } from "./api.js";
import { byId, element, icon, iconButton } from "./dom.js";
import { ExpertMap } from "./experts.js";
import { asPart, readFiles } from "./media.js";
import { requestFields, showDefaults, systemPrompt } from "./settings.js";
import { tip, tokenOf, tokenTip } from "./tokens.js";

const NEAR_END = 80;
const DEMO_QUESTIONS = ["What is 27 + 45?", "Sort: pear fig apple", "What is the capital of France?"];
const QUESTIONS = ["Explain what a mixture of experts is.", "Write a haiku about rain.",
  "What would you ask a geologist?"];

const chat = { messages: [], attached: [], answering: null, abort: null };
const map = new ExpertMap();
let models = [];
const narrow = matchMedia("(max-width: 860px)");

// Models.

const facts = () => models.find(({ id }) => id === byId("model").value)?.gemloupe ?? null;

async function connect() {
  try {
    models = await listModels();
  } catch (error) {
    if (error.status === 401) askForKey();
    else showConnectionProblem(error);
    return;
  }
  const bases = models.filter((model) => !model.gemloupe.adapter);
  byId("model").replaceChildren(...bases.map(({ id }) => element("option", { value: id }, id)));
  byId("model-field").hidden = false;
  chooseModel();
  if (!chat.messages.length) showWelcome();
  byId("input").focus();
}

function chooseModel() {
  const known = facts();
  const { images, audio } = known;
  const name = byId("model").value;
  const adapters = models.filter(({ id, gemloupe }) => gemloupe.adapter && id.startsWith(`${name}:`));
  const options = adapters.map(({ gemloupe: { adapter } }) => element("option", { value: adapter }, adapter));
  byId("adapter").replaceChildren(element("option", { value: "" }, "None"), ...options);
  byId("adapter-field").hidden = !adapters.length;
  byId("attach").hidden = !(images || audio);
  byId("attach-label").textContent = images && audio ? "Add a picture or sound" : images ? "Add a picture" : "Add a sound";
  byId("files").accept = [images ? "image/*" : "", audio ? "audio/*" : ""].filter(Boolean).join(",");
  showDefaults(known);
  map.forModel(known);
  if (!chat.messages.length && byId("messages").childElementCount) showWelcome();
  update();
}

function card(...children) {
  byId("messages").replaceChildren(element("div", { class: "card" }, ...children));
}

function askForKey() {
  const input = element("input", { type: "password", id: "key", autocomplete: "off", required: true });
  const wrong = apiKey.get() !== null;
  apiKey.drop();
  const form = element("form", { class: "key" },
    element("label", { class: "field" }, element("span", {}, "API key"), input),
    element("button", { type: "submit", class: "primary" }, "Connect"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    apiKey.set(input.value);
    connect();
  });
  const said = wrong ? "That key is not the right one." : "This server asks for a key.";
  card(element("h1", {}, said),
    element("p", {}, "It stays in this tab until the tab is closed, and goes to this server alone."), form);
  input.focus();
}

function showConnectionProblem(error) {
  card(element("h1", {}, "No model yet"), element("p", { role: "alert" }, error.message),
    element("button", { type: "button", class: "primary", onclick: connect }, "Try again"));
}

function showWelcome() {
  const isDemo = byId("model").value.startsWith("demo:");
  const questions = (isDemo ? DEMO_QUESTIONS : QUESTIONS).map((text) =>
    element("button", { type: "button", class: "question", onclick: () => send(text, []) }, text));
  const about = isDemo
    ? "A demo model: tiny, trained on sums, sorting and a few facts."
    : "Hover over a token to see what else might have come.";
  byId("messages").replaceChildren(element("div", { class: "welcome" },
    element("h1", {}, "Look inside an answer"), element("p", {}, about),
    element("div", { class: "questions" }, ...questions)));
}

// Messages.

function userNode(message) {
  const media = message.media.map(preview);
  const edit = iconButton("edit", "Edit and resend", () => editLast());
  return element("article", { class: "message user", "aria-label": "Your message" },
    element("div", { class: "bubble" },
      media.length ? element("div", { class: "media" }, ...media) : null,
      message.text ? element("p", {}, message.text) : null),
    element("div", { class: "tools" }, edit));
}

function preview({ kind, name, url }) {
  return kind === "image"
    ? element("img", { src: url, alt: name, title: name })
    : element("audio", { src: url, controls: true, title: name, "aria-label": name });
}

function asRequest(messages) {
  const system = systemPrompt();
  const made = system ? [{ role: "system", content: system }] : [];
  for (const message of messages) {
    if (message.role === "user") {
      const parts = message.media.map(asPart);
      if (message.text) parts.push({ type: "text", text: message.text });
      made.push({ role: "user", content: message.media.length ? parts : message.text });
    } else if (message.text) {
      made.push({ role: "assistant", content: message.text });
    }
  }
  return made;
}

function send(text, media) {
  if (chat.answering) return;
  const message = { role: "user", text, media };
  message.node = userNode(message);
  if (!chat.messages.length) byId("messages").replaceChildren();
  chat.messages.push(message);
  byId("messages").append(message.node);
  answer();
}

async function answer() {
  let fields;
  try {
    fields = requestFields();
  } catch (error) {
    showPanel(true);
    note(error.message);
    return;
  }
  note("");
  const known = facts();
  if (known.experts) fields.routing = "stream";
  const request = { model: byId("model").value, ...fields };
  const reply = new Answer(request, known);
  const earlier = chat.messages.slice();
  chat.messages.push(reply);
  chat.answering = reply;
  chat.abort = new AbortController();
  byId("messages").append(reply.node);
  map.show(reply.routing, true);
  update();
  say("Answering");
  scrollDown(true);
  const body = { ...request, messages: asRequest(earlier), stream: true, stream_options: { include_usage: true } };
  try {
    for await (const { chunk, warning } of streamChat(body, chat.abort.signal)) {
      if (warning) reply.warning = warning;
      else reply.take(chunk);
      map.update();
    }
    reply.end("stop");
    say(`The answer is complete: ${reply.count} tokens`);
  } catch (error) {
    if (error.name === "AbortError") {
      reply.end("cancelled");
      say("Stopped");
    } else {
      reply.end("error", error instanceof Failure ? error : new Failure(String(error)));
      if (!(error instanceof Failure)) console.error(error);
    }
  }
  finished(reply);
}

function finished(reply) {
  chat.answering = chat.abort = null;
  const again = () => {
    remove(reply);
    answer();
  };
  if (reply.failure) {
    const children = [element("p", {}, reply.failure.message)];
    if (reply.failure.status === 401) {
      children.push(element("button", { type: "button", class: "primary", onclick: () => {
        newChat();
        askForKey();
      } }, "Enter the key"));
    } else {
      children.push(element("button", { type: "button", class: "primary", onclick: again }, "Try again"));
    }
    reply.problem.replaceChildren(...children);
    reply.problem.hidden = false;
  } else {
    reply.tools.append(iconButton("again", "Again", again));
  }
  if (reply.warning) reply.node.append(element("p", { class: "warning" }, reply.warning));
  if (chat.messages.includes(reply)) map.show(reply.routing, false);
  update();
  scrollDown();
}

function remove(message) {
  message.node.remove();
  chat.messages.splice(chat.messages.indexOf(message));
}

function editLast() {
  if (chat.answering) return;
  const index = chat.messages.findLastIndex(({ role }) => role === "user");
  const message = chat.messages[index];
  for (const later of chat.messages.slice(index)) later.node.remove();
  chat.messages.length = index;
  chat.attached = message.media;
  byId("input").value = message.text;
  showAttached();
  if (!chat.messages.length) showWelcome();
  map.show(null);
  update();
  byId("input").focus();
}

function newChat() {
  chat.abort?.abort();
  chat.messages = [];
  chat.attached = [];
  byId("input").value = "";
  showAttached();
  showWelcome();
  note("");
  map.show(null);
  update();
  byId("input").focus();
}

function exportChat() {
  const messages = chat.messages.map((message) =>
    message.role === "user" ? { role: "user", content: message.text, media: message.media } : message);
  const saved = { made_by: "gemloupe", model: byId("model").value, system: systemPrompt(), messages };
  const url = URL.createObjectURL(new Blob([JSON.stringify(saved, null, 1)], { type: "application/json" }));
  const link = element("a", { href: url, download: "gemloupe-chat.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// The composer.

function update() {
  const input = byId("input");
  const busy = chat.answering !== null;
  byId("send").disabled = !models.length || !(input.value.trim() || chat.attached.length);
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("export").disabled = busy || !chat.messages.length;
  const last = chat.messages.findLast(({ role }) => role === "user");
  for (const message of chat.messages) {
    message.node.classList.toggle("last", message === last || message === chat.messages.at(-1));
  }
  document.body.classList.toggle("busy", busy);
  document.body.classList.toggle("shows-probabilities", byId("probabilities").checked);
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, innerHeight * 0.4)}px`;
}

function submit(event) {
  event?.preventDefault();
  const input = byId("input");
  if (byId("send").disabled || chat.answering) return;
  const [text, media] = [input.value.trim(), chat.attached];
  input.value = "";
  chat.attached = [];
  showAttached();
  send(text, media);
}

function note(text) {
  byId("note").textContent = text;
  byId("note").hidden = !text;
}

const say = (text) => (byId("status").textContent = text);

async function attach(files) {
  if (!files.length || !facts()) return;
  try {
    chat.attached.push(...await readFiles(files, facts()));
    note("");
  } catch (error) {
    note(error.message);
  }
  showAttached();
  update();
}

function showAttached() {
  const items = chat.attached.map((medium) => {
    const drop = element("button", { type: "button", class: "drop-one", "aria-label": `Remove ${medium.name}`,
      onclick: () => {
        chat.attached.splice(chat.attached.indexOf(medium), 1);
        showAttached();
        update();
      } }, icon("close"));
    const shown = medium.kind === "image" ? preview(medium) : element("span", { class: "sound" }, icon("sound"), medium.name);
    return element("li", { class: medium.kind }, shown, drop);
  });
  byId("attached").replaceChildren(...items);
  byId("attached").hidden = !items.length;
}

// Scrolling: what comes is followed only by those who are at the end.

const scroll = byId("scroll");
let follows = true;

function scrollDown(always = false) {
  if (always) follows = true;
  if (follows) scroll.scrollTop = scroll.scrollHeight;
  byId("jump").hidden = follows;
}

scroll.addEventListener("scroll", () => {
  follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_END;
  byId("jump").hidden = follows;
  tip.hide();
}, { passive: true });
const resized = new ResizeObserver(() => scrollDown());
resized.observe(byId("messages"));
resized.observe(scroll);
byId("jump").addEventListener("click", () => scrollDown(true));

// Tokens.

function pointAt(node) {
  const token = node && tokenOf(node);
  for (const old of document.querySelectorAll(".token.at")) old.classList.remove("at");
  if (!token) {
    tip.hide();
    map.highlight(null);
    return;
  }
  node.classList.add("at");
  tip.show(node.getClientRects()[0], tokenTip(token));
  const reply = chat.messages.find((message) => message.node.contains(node));
  if (!reply?.routing) return;
  if (map.routing !== reply.routing) map.show(reply.routing, reply === chat.answering);
  map.highlight(reply.position(token));
}

const messages = byId("messages");
messages.addEventListener("pointerover", (event) => pointAt(event.target.closest?.(".token")));
messages.addEventListener("pointerleave", ({ pointerType }) => {
  // A finger is lifted to see what was under it.
  if (pointerType !== "touch") pointAt(null);
});
messages.addEventListener("focusin", (event) => {
  if (event.target.matches(".token:focus-visible")) pointAt(event.target);
});
messages.addEventListener("focusout", () => pointAt(null));
messages.addEventListener("keydown", (event) => {
  const group = event.target.closest?.(".prose");
  const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
  if (!group || step === undefined || event.target.closest("pre:focus, .table:focus")) return;
  const tokens = [...group.querySelectorAll(".token")];
  if (!tokens.length) return;
  event.preventDefault();
  const at = tokens.indexOf(document.activeElement);
  const next = at < 0 ? (step < 0 ? tokens.length - 1 : 0) : at + step;
  tokens[Math.min(tokens.length - 1, Math.max(0, next))].focus();
});

// The panel.

function showPanel(open) {
  document.body.classList.toggle("panel-open", open);
  byId("panel-toggle").setAttribute("aria-expanded", open);
  byId("panel").inert = !open;
}

// Wiring.

byId("composer").addEventListener("submit", submit);
byId("input").addEventListener("input", update);
byId("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
});
byId("stop").addEventListener("click", () => chat.abort?.abort());
byId("settings").addEventListener("submit", (event) => event.preventDefault());
byId("model").addEventListener("change", chooseModel);
byId("probabilities").addEventListener("change", update);
byId("new-chat").addEventListener("click", newChat);
byId("export").addEventListener("click", exportChat);
byId("panel-toggle").addEventListener("click", () => showPanel(!document.body.classList.contains("panel-open")));
byId("panel-close").addEventListener("click", () => {
  showPanel(false);
  byId("panel-toggle").focus();
});
byId("attach").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", ({ target }) => {
  attach([...target.files]);
  target.value = "";
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (!byId("tip").hidden) pointAt(null);
  if (chat.abort) chat.abort.abort();
  else if (narrow.matches) showPanel(false);
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  attach(files);
});
let dragged = 0;
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => {
  if (!carriesFiles(event)) return;
  dragged += 1;
  byId("drop").hidden = !(facts()?.images || facts()?.audio);
});
document.addEventListener("dragleave", (event) => {
  if (!carriesFiles(event)) return;
  dragged -= 1;
  if (dragged <= 0) byId("drop").hidden = true;
});
document.addEventListener("dragover", (event) => {
  if (carriesFiles(event)) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  dragged = 0;
  byId("drop").hidden = true;
  attach([...event.dataTransfer.files]);
});
narrow.addEventListener("change", () => showPanel(!narrow.matches));
showPanel(!narrow.matches);
update();
connect();
