// Nodes from words. Texts become text nodes, so nothing that a model says is ever read as HTML.

/** make("a", {href, className, onclick, "aria-label"}, child or text, ...) -> element. Children that are null are left out. */
export function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node && !name.startsWith("aria-")) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** A button with one of the page's icons, called `label`. */
export function iconButton(id, label, onclick, properties = {}) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", "#i-" + id);
  svg.append(use);
  return make("button", { type: "button", className: "icon", title: label, "aria-label": label, onclick, ...properties }, svg);
}

/** Say something in a corner for a while, with one thing that can be done about it. */
export function notice(text, action = "", act = null) {
  const node = make("p", { className: "notice" }, text);
  if (act) node.append(make("button", { type: "button", className: "plain", onclick: () => { act(); node.remove(); } }, action));
  const box = document.getElementById("notices");
  box.replaceChildren(node);
  setTimeout(() => node.remove(), 10000);
}

/** Whether a key in a field of several lines sends it: Enter, but for touch screens, whose Enter has no Shift. */
export const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches;

/** Copy to the clipboard, which browsers give to https and localhost alone: else by way of a selection. */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { value: text, className: "hidden" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  document.getElementById("said").textContent = "Copied";
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1200);
}

/** Plain data as rows of names and values, for replies of a schema and arguments of calls. */
export function table(value) {
  if (value === null || typeof value !== "object") {
    return make("span", { className: "value " + (value === null ? "null" : typeof value) }, value === null ? "none" : String(value));
  }
  const entries = Object.entries(value);
  if (!entries.length) return make("span", { className: "value null" }, "none");
  if (Array.isArray(value)) return make("ol", { className: "values" }, entries.map(([, one]) => make("li", {}, table(one))));
  return make("dl", { className: "values" },
    entries.map(([name, one]) => make("div", {}, make("dt", {}, name), make("dd", {}, table(one)))));
}
