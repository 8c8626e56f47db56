// The page: the list of conversations, the one that is open, and what is done with it.

import * as api from "./api.js";
import { make, notice, sends } from "./dom.js";
import { view } from "./message.js";
import * as store from "./store.js";

const at = (id) => document.getElementById(id);
const [text, box, messages, title, settingsForm] = ["text", "scroll", "messages", "title", "settings-form"].map(at);
const running = new Map();              // conversation's id -> AbortController of the reply that is being made
const SENT = ["role", "content", "reasoning_content", "tool_calls", "tool_call_id"];
const page = { feedback: false, running: () => running.has(chat.id), edit, retry, answer, rate };
let settings = store.settings();
let known = store.chats();              // what the list shows; one without messages is not kept
let chat = known.find((one) => one.id === sessionStorage.getItem("edgewright:open")) ?? empty();
let views = new Map();                  // message -> its view, of the conversation that is open
let following = true;                   // the end of the conversation is to stay in sight

function empty() {
  return { id: Date.now().toString(36) + Math.random().toString(36).slice(2, 8), title: "", at: Date.now(), messages: [] };
}

/** Words that fail in no way but one: the error is told in a corner. */
function attempt(work) {
  try { return work(); } catch (error) { notice(error.message); return null; }
}

function keep(one) {
  one.at = Date.now();
  known = [one, ...known.filter((other) => other.id !== one.id)];
  const removed = attempt(() => store.save(one)) ?? [];
  if (removed.length) {
    notice(`The browser's storage is full, so the oldest went: ${removed.join(", ")}.`);
    known = known.filter((other) => other.id === one.id || running.has(other.id) || !removed.includes(other.title));
  }
  drawList();
}

// ---- what is seen

function drawList() {
  const focused = document.activeElement?.dataset.id;
  at("list").replaceChildren(...known.map((one) => make("li", {}, make("button", {
    type: "button", className: running.has(one.id) ? "running" : "", onclick: () => open(one),
    "data-id": one.id, ...(one.id === chat.id && { "aria-current": "true" }) }, one.title || "New conversation"))));
  if (focused) at("list").querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus();
  if (document.activeElement !== title) title.value = chat.title;
  title.placeholder = "New conversation";
  document.title = chat.title || "Edgewright";
  const busy = running.has(chat.id);
  at("send").setAttribute("aria-label", busy ? "Stop" : "Send");
  at("send").querySelector("use").setAttribute("href", busy ? "#i-stop" : "#i-send");
  for (const id of ["title", "export-one", "delete-one"]) at(id).disabled = !chat.messages.length;
}

function draw() {
  views = new Map(chat.messages.map((message, index) => [message, view(page, message, index, chat)]));
  messages.replaceChildren(...[...views.values()].map((one) => one.node));
  attempt(() => sessionStorage.setItem("edgewright:open", chat.id));          // for a reload
  at("empty").hidden = chat.messages.length > 0;
  drawList();
  follow();
}

function follow() {
  if (following) box.scrollTop = box.scrollHeight;
}

function open(one) {
  chat = one;
  following = true;
  if (at("side").matches(":popover-open")) at("side").hidePopover();
  draw();
  text.focus();
}

// ---- what is done

/** A reply to the conversation as it stands. */
async function reply() {
  const mine = chat, controller = new AbortController(), begun = performance.now();
  const message = { role: "assistant", content: "", system: settings.system, model: at("model").value };
  const request = { model: message.model, messages: sent(mine.messages, settings.system), ...options() };
  if (request.response_format) message.structured = true;
  if (request.tools) message.tools = request.tools;
  mine.messages.push(message);
  running.set(mine.id, controller);
  following = true;
  at("said").textContent = "Waiting for the reply";
  draw();
  keep(mine);
  let first = 0, last = 0, due = 0, saved = begun;
  const show = () => { due = 0; views.get(message)?.update(); follow(); };
  try {
    for await (const chunk of api.stream(request, controller.signal)) {
      message.id = chunk.id;
      if (chunk.usage) message.usage = chunk.usage;
      const [choice] = chunk.choices ?? [];
      if (choice?.finish_reason) message.finish = choice.finish_reason;
      if (!grow(message, choice?.delta)) continue;
      last = performance.now();
      first ||= last;
      due ||= requestAnimationFrame(show);
      if (last - saved > 3000) { attempt(() => store.save(mine)); saved = last; }
    }
  } catch (error) {
    if (controller.signal.aborted) message.finish = "stopped";
    else message.error = error.message;
    if (error.status === 401) openSettings("key");
  }
  cancelAnimationFrame(due);
  const count = message.usage?.completion_tokens;
  if (first) message.times = { first: first - begun, rate: count > 1 ? (count - 1) / (last - first) * 1000 : 0 };
  running.delete(mine.id);
  if (known.includes(mine)) keep(mine);                             // else it was deleted meanwhile
  if (chat === mine) {
    for (const one of views.values()) one.update();
    follow();
    at("said").textContent = message.error ?? (message.finish === "stopped" ? "Stopped" : message.content || "The reply is there");
  }
}

/** Add a delta to a message; false where it says nothing. */
function grow(message, delta) {
  const thought = delta?.reasoning_content ?? delta?.reasoning;
  if (delta?.content) message.content += delta.content;
  if (thought) message.reasoning_content = (message.reasoning_content ?? "") + thought;
  for (const part of delta?.tool_calls ?? []) {
    const calls = message.tool_calls ??= [];
    const call = calls[part.index] ??= { id: part.id, type: "function", function: { name: "", arguments: "" } };
    call.function.name += part.function?.name ?? "";
    call.function.arguments += part.function?.arguments ?? "";
  }
  return Boolean(delta?.content || thought || delta?.tool_calls?.length);
}

/** Messages as the server takes them: without what is the page's own, and replies of which nothing came. Questions that
 * then follow each other are one, since many templates take turns alone. */
function sent(list, system) {
  const told = system ? [{ role: "system", content: system }] : [];
  for (const one of list) {
    if (one.role === "assistant" && !one.content && !one.tool_calls) continue;
    if (one.role === "user" && told.at(-1)?.role === "user") told.at(-1).content += "\n\n" + one.content;
    else told.push(Object.fromEntries(SENT.filter((name) => one[name] !== undefined).map((name) => [name, one[name]])));
  }
  return told;
}

/** What the settings add to a request. */
function options() {
  const numbers = ["temperature", "top_p", "top_k", "max_tokens", "seed"].filter((name) => settings[name] !== "");
  return {
    ...Object.fromEntries(numbers.map((name) => [name, Number(settings[name])])),
    ...(settings.schema && {
      response_format: { type: "json_schema", json_schema: { name: "reply", schema: JSON.parse(settings.schema) } } }),
    ...(settings.tools && { tools: JSON.parse(settings.tools) }),
    ...(settings.thinking && { chat_template_kwargs: { enable_thinking: settings.thinking === "on" } }) };
}

function send() {
  if (running.has(chat.id)) return stop();
  const words = text.value.trim();
  if (!words) return;
  chat.messages.push({ role: "user", content: words });
  chat.title ||= words.split("\n")[0].slice(0, 60);
  text.value = "";
  fit();
  reply();
}

const stop = () => running.get(chat.id)?.abort();

function edit(index, words) {
  chat.messages.splice(index, Infinity, { role: "user", content: words });
  reply();
  text.focus();
}

function retry(index) {
  chat.messages.splice(index);
  reply();
  text.focus();
}

function answer(results) {
  chat.messages.push(...results);
  reply();
  text.focus();
}

/** Tell the server what a reply was worth. Resolves to whether it was stored. */
async function rate(message, rating, correction) {
  const before = chat.messages.slice(0, chat.messages.indexOf(message));
  const [said] = sent([message]);
  const mine = chat;
  try {
    await api.feedback({ id: message.id, model: message.model, messages: sent(before, message.system), reply: said, rating,
      ...(message.tools && { tools: message.tools }), ...(correction && { correction }) });
  } catch (error) {
    notice(error.message);
    return false;
  }
  message.rating = rating;
  attempt(() => store.save(mine));
  at("said").textContent = "Thank you";
  return true;
}

function removeChat() {
  const gone = chat;
  stop();
  store.remove(gone);
  known = known.filter((one) => one.id !== gone.id);
  open(empty());
  notice(`“${gone.title}” is deleted.`, "Undo", () => { keep(gone); open(gone); });
}

function exportChat() {
  const record = { title: chat.title, model: at("model").value, messages: sent(chat.messages, settings.system) };
  const href = URL.createObjectURL(new Blob([JSON.stringify(record, null, 1) + "\n"], { type: "application/json" }));
  make("a", { href, download: (chat.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "conversation") + ".json" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

// ---- settings

function openSettings(focus = "system") {
  for (const [name, value] of Object.entries({ ...settings, key: store.key() })) {
    if (settingsForm.elements[name]) settingsForm.elements[name].value = value;
  }
  if (!at("settings-dialog").open) at("settings-dialog").showModal();
  settingsForm.elements[focus].focus();
}

/** Why the text of a field cannot be used; "" where it can. */
function wrong(name, value) {
  if (!value.trim()) return "";
  try {
    const read = JSON.parse(value);
    if (name === "tools") return Array.isArray(read) ? "" : "This should be a list: [{\"type\": \"function\", ...}]";
    return read && typeof read === "object" && !Array.isArray(read) ? "" : "A schema is an object: {\"type\": \"object\", ...}";
  } catch (error) { return "This is not JSON: " + error.message; }
}

function takeSettings(event) {
  event.preventDefault();
  for (const name of ["schema", "tools"]) settingsForm.elements[name].setCustomValidity(wrong(name, settingsForm.elements[name].value));
  if (!settingsForm.reportValidity()) return;
  const { key, ...values } = Object.fromEntries(new FormData(settingsForm));
  settings = { ...settings, ...Object.fromEntries(Object.entries(values).map(([name, value]) => [name, value.trim()])) };
  attempt(() => { store.saveSettings(settings); store.saveKey(key.trim()); });
  at("settings-dialog").close();
  text.focus();
  showActive();
  connect();
}

function showActive() {
  const tools = settings.tools ? JSON.parse(settings.tools).length : 0;
  at("active").textContent = [settings.system && "system prompt", settings.schema && "schema",
    tools && `${tools} tool${tools > 1 ? "s" : ""}`, settings.thinking && `thinking ${settings.thinking}`].filter(Boolean).join(", ");
}

/** Ask the server what it has. */
async function connect() {
  try {
    const names = await api.models();
    at("model").replaceChildren(...names.map((name) => make("option", {}, name)));
    if (names.includes(settings.model)) at("model").value = settings.model;
    at("where").textContent = `${at("model").value} on ${location.host}`;
    page.feedback = await api.takesFeedback().catch(() => false);
    for (const one of views.values()) one.update();
  } catch (error) {
    notice(error.status === 401 ? "This server asks for an API key." : error.message, "Try again", connect);
    if (error.status === 401) openSettings("key");
  }
}

// ---- what is pressed

/** The field is as high as its text. */
function fit() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
}

text.addEventListener("input", fit);
text.addEventListener("keydown", (event) => {
  if (!sends(event)) return;
  event.preventDefault();
  if (!running.has(chat.id)) send();
});
at("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.defaultPrevented && !document.querySelector("dialog[open], :popover-open")) stop();
});
box.addEventListener("scroll", () => {
  following = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
  at("latest").hidden = following;
});
at("latest").onclick = () => { following = true; follow(); text.focus(); };
at("new").onclick = () => open(empty());
title.onchange = () => { chat.title = title.value.trim() || chat.title; keep(chat); };
title.onkeydown = (event) => { if (event.key === "Enter") text.focus(); };
at("export-one").onclick = exportChat;
at("delete-one").onclick = removeChat;
at("open-settings").onclick = () => openSettings();
at("model").onchange = () => {
  settings.model = at("model").value;
  attempt(() => store.saveSettings(settings));
  at("where").textContent = `${settings.model} on ${location.host}`;
};
settingsForm.addEventListener("submit", takeSettings);
settingsForm.addEventListener("input", (event) => event.target.setCustomValidity(""));
at("reset").onclick = () => { for (const field of settingsForm.elements) field.value = ""; };
document.querySelector(".skip").onclick = (event) => { event.preventDefault(); text.focus(); };
addEventListener("pagehide", () => {
  for (const one of known.filter((chat) => running.has(chat.id))) {
    running.get(one.id).abort();
    one.messages.at(-1).finish = "stopped";
    attempt(() => store.save(one));
  }
});
addEventListener("storage", (event) => {                           // another tab has written
  const told = store.told(event);
  if (!told || running.has(told.id)) return;
  known = [...(told.chat ? [told.chat] : []), ...known.filter((one) => one.id !== told.id)].sort((a, b) => b.at - a.at);
  if (!told.chat || told.id !== chat.id) return drawList();
  chat = told.chat;
  draw();
});

draw();
showActive();
connect();
text.focus();
