// One message of a conversation on the page: view(page, message, index, chat) -> {node, update}. `update` shows what the
// message has become, and touches nothing that is as it was. page: what can be done (chat.js).

import { copy, iconButton, make, sends, table } from "./dom.js";
import { code, render } from "./markdown.js";

export function view(page, message, index, chat) {
  const kinds = { user: question, assistant: reply, tool: result };
  return kinds[message.role](page, message, index, chat);
}

function question(page, message, index) {
  const bubble = make("div", { className: "bubble" }, message.content);
  const button = iconButton("edit", "Edit", () => {
    const form = ask("The message", message.content, "Send", (words) => page.edit(index, words),
      () => { form.replaceWith(bubble); button.focus(); });
    bubble.replaceWith(form);
    form.focusText();
  });
  const again = iconButton("copy", "Copy", () => copy(message.content, again));
  const node = make("li", { className: "user" }, bubble, make("div", { className: "tools" }, again, button));
  const update = () => { button.disabled = page.running(); };
  update();
  return { node, update };
}

/** A form with one text: Enter or the button sends it, Escape leaves it. */
function ask(label, value, send, done, leave) {
  const area = make("textarea", { value, rows: Math.min(value.split("\n").length + 1, 10), "aria-label": label });
  const form = make("form", { className: "ask" }, area, make("div", { className: "row" },
    make("button", { type: "button", className: "plain", onclick: leave }, "Cancel"), make("button", { className: "main" }, send)));
  const submit = (event) => { event.preventDefault(); if (area.value.trim()) done(area.value.trim()); };
  form.addEventListener("submit", submit);
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.preventDefault(); leave(); }
    if (sends(event)) submit(event);
  });
  form.focusText = () => { area.focus(); area.setSelectionRange(value.length, value.length); };
  return form;
}

function result(page, message, index, chat) {
  const call = chat.messages.flatMap((one) => one.tool_calls ?? []).find((one) => one.id === message.tool_call_id);
  const details = make("details", { className: "card" }, make("summary", {}, `Result of ${call?.function.name ?? "a call"}`),
    readable(message.content));
  return { node: make("li", { className: "tool" }, details), update() {} };
}

/** A text that is JSON as a table, else as code. */
function readable(text) {
  try {
    const value = JSON.parse(text);
    if (value && typeof value === "object") return table(value);
  } catch { /* not whole yet, or not JSON */ }
  return code(text, /^\s*[{[]/.test(text) ? "json" : "");
}

function reply(page, message, index, chat) {
  const thought = make("div", { className: "prose" });
  const folded = make("details", { className: "thought" }, make("summary", {}, make("span", {})), thought);
  const body = make("div", { className: "prose" }), calls = make("div"), note = make("p", { className: "note" }), form = make("div");
  const figures = make("span", { className: "figures" });
  const again = iconButton("copy", "Copy", () => copy(message.content, again));
  const retry = iconButton("retry", "Retry", () => page.retry(index));
  const good = iconButton("good", "Good reply", () => page.rate(message, "up").then(update));
  const bad = iconButton("bad", "Bad reply", async () => { if (await page.rate(message, "down")) { update(); correct(); } });
  const tools = make("div", { className: "tools" }, again, retry, good, bad, figures);
  const node = make("li", { className: "assistant" }, folded, body, calls, note, form, tools);
  let drawn = "";

  function correct() {
    const leave = () => { form.replaceChildren(); bad.focus(); };
    const asked = ask("What the reply should have been", message.content, "Send the correction",
      async (words) => { if (await page.rate(message, "down", words)) leave(); }, leave);
    form.replaceChildren(make("p", { className: "quiet" }, "What should it have been? Correct it if you like."), asked);
    asked.focusText();
  }

  function update() {
    const going = page.running() && chat.messages.at(-1) === message;
    const waiting = going && !message.content && !message.reasoning_content && !message.tool_calls;
    folded.hidden = !message.reasoning_content;
    folded.querySelector("span").textContent = going && !message.content ? "Thinking" : "Thought";
    if (message.reasoning_content) render(thought, message.reasoning_content);
    if (message.structured) body.replaceChildren(...(message.content ? [readable(message.content)] : []));
    else render(body, message.content);
    const state = JSON.stringify([message.tool_calls, going, chat.messages.at(-1) === message]);
    if (state !== drawn) drawCalls(calls, page, message, going || chat.messages.at(-1) !== message);
    drawn = state;
    note.textContent = message.error ?? { length: "The reply has reached its greatest length.", stopped: "Stopped." }[message.finish] ?? "";
    note.className = message.error ? "note error" : "note";
    node.classList.toggle("waiting", waiting);
    node.classList.toggle("going", going);
    node.setAttribute("aria-busy", going);
    tools.hidden = going;
    retry.disabled = page.running();
    good.hidden = bad.hidden = !page.feedback || !(message.content || message.tool_calls);
    good.setAttribute("aria-pressed", message.rating === "up");
    bad.setAttribute("aria-pressed", message.rating === "down");
    const { first, rate } = message.times ?? {};
    figures.textContent = [first && `first token ${(first / 1000).toFixed(2)} s`,
      rate && `${rate < 100 ? rate.toFixed(1) : Math.round(rate)} tokens/s`,
      message.usage && `${message.usage.completion_tokens} tokens`].filter(Boolean).join(" · ");
  }
  update();
  return { node, update };
}

/** What a reply calls, and, until it is answered, where the results go. */
function drawCalls(target, page, message, closed) {
  const calls = (message.tool_calls ?? []).filter(Boolean);
  target.replaceChildren(...calls.map((call) => make("details", { className: "card", open: true },
    make("summary", {}, "Calls ", make("strong", {}, call.function.name)), readable(call.function.arguments))));
  if (closed || !calls.length) return;
  const areas = calls.map((call) => make("textarea", { rows: 2, required: true, className: "code" }));
  const form = make("form", { className: "ask" }, calls.map((call, n) => make("label", {}, `Result of ${call.function.name}`, areas[n])),
    make("div", { className: "row" }, make("button", { className: "main" }, "Send the results")));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    page.answer(calls.map((call, n) => ({ role: "tool", tool_call_id: call.id, content: areas[n].value })));
  });
  target.append(form);
}
