// Markdown as models write it, as DOM nodes: never HTML. Headings, paragraphs, fenced code, lists, quotes, tables, rules;
// code, bold, italic, struck, links. HTML shows as the text it is, images as links; a link goes to http, https or mailto.

import { copy, iconButton, make } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|(\d{1,9})[.)])(?:\s+(.*))?$/;
const DEEPEST = 12;             // quotes and lists in each other; further in, they are text

/** Show `text` in `target`, whose unchanged blocks stay as they are (selected, scrolled, folded) while a reply grows. */
export function render(target, text) {
  const old = target.blocks ?? [];
  const found = [...blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0)];
  target.blocks = found.map(([source, build], index) => {
    if (old[index]?.source === source) return old[index];
    const node = build();
    if (old[index]) old[index].node.replaceWith(node);
    else target.append(node);
    return { source, node };
  });
  for (const { node } of old.slice(found.length)) node.remove();
}

/** [source, () => node] of each block. */
function* blocks(lines, depth) {
  let at = 0;
  const take = (end, build) => {
    const part = lines.slice(at, end);
    at = end;
    return [part.join("\n"), () => build(part)];
  };
  while (at < lines.length) {
    const line = lines[at];
    let end = at + 1, match;
    if (!line.trim()) {
      at = end;
    } else if ((match = FENCE.exec(line))) {
      const [, mark, language] = match;
      const closing = (one) => one.trim().startsWith(mark) && !one.trim().replaceAll(mark[0], "");
      const indent = indentOf(line);
      while (end < lines.length && !closing(lines[end])) end++;
      const inside = end - at;
      yield take(Math.min(end + 1, lines.length), (part) =>
        code(part.slice(1, inside).map((one) => one.slice(Math.min(indent, indentOf(one)))).join("\n"), language));
    } else if ((match = HEADING.exec(line))) {
      const [, { length }, words] = match;
      yield take(end, () => make("h" + Math.min(length + 1, 6), {}, inline(words)));
    } else if (RULE.test(line)) {
      yield take(end, () => make("hr"));
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      while (end < lines.length && (QUOTE.test(lines[end]) || lines[end].trim() && !begins(lines[end]))) end++;
      yield take(end, (part) => make("blockquote", {}, nodes(part.map((one) => one.replace(QUOTE, "")), depth + 1)));
    } else if (ITEM.test(line) && depth < DEEPEST) {
      end = listEnd(lines, at);
      yield take(end, (part) => list(part, depth));
    } else if (line.includes("|") && isRuler(lines[end] ?? "", cells(line).length)) {
      end++;
      while (end < lines.length && lines[end].includes("|")) end++;
      yield take(end, grid);
    } else {
      while (end < lines.length && lines[end].trim() && !begins(lines[end], true)) end++;
      yield take(end, (part) => make("p", {}, inline(part.map((one) => one.trimStart()).join("\n"))));
    }
  }
}

const nodes = (lines, depth) => Array.from(blocks(lines, depth), ([, build]) => build());

/** Whether a line ends the paragraph before it. Of numbers only 1 does: "in the year\n1990. It was". */
function begins(line, paragraph = false) {
  const item = ITEM.exec(line);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)
    || item !== null && item[4] !== undefined && !(paragraph && item[3] && item[3] !== "1");
}

const indentOf = (line) => line.search(/\S|$/);
const kindOf = (item) => (item[3] ? item[2].at(-1) : item[2]);

function listEnd(lines, at) {
  const first = ITEM.exec(lines[at]);
  const indent = first[1].length;
  let end = at + 1, blank = false;
  for (; end < lines.length; end++) {
    const line = lines[end];
    if (!line.trim()) { blank = true; continue; }
    const item = ITEM.exec(line);
    const own = indentOf(line) >= indent + 2;
    const next = item && kindOf(item) === kindOf(first) && !RULE.test(line);
    if (!own && !next && (blank || begins(line))) break;
    blank = false;
  }
  while (!lines[end - 1].trim()) end--;
  return end;
}

function list(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const items = [];
  let width = 0;
  for (const line of lines) {
    const item = indentOf(line) < first[1].length + 2 ? ITEM.exec(line) : null;
    if (item) {
      width = item[1].length + item[2].length + 1;
      items.push([item[4] ?? ""]);
    } else {
      items.at(-1).push(line.slice(Math.min(width, indentOf(line))));
    }
  }
  return make(first[3] ? "ol" : "ul", first[3] ? { start: Number(first[3]) } : {}, items.map((item) => {
    const task = /^\[([ xX])\] /.exec(item[0]);
    if (!task) return make("li", {}, nodes(item, depth + 1));
    item[0] = item[0].slice(4);
    const box = make("input", { type: "checkbox", disabled: true, checked: task[1] !== " " });
    return make("li", { className: "task" }, box, nodes(item, depth + 1));
  }));
}

/** The cells of a row of a table; "\|" is a bar in one. */
const cells = (line) => line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/)
  .map((one) => one.trim().replaceAll("\\|", "|"));
const isRuler = (line, columns) => line.includes("-") && cells(line).length === columns && cells(line).every((one) => /^:?-+:?$/.test(one));

function grid([head, ruler, ...rows]) {
  const sides = cells(ruler).map((one) => (one.endsWith(":") ? (one.startsWith(":") ? "middle" : "right") : ""));
  const row = (line, tag) => {
    const found = cells(line);
    return make("tr", {}, sides.map((className, column) => make(tag, { className }, inline(found[column] ?? ""))));
  };
  return make("div", { className: "wide-table", tabIndex: 0, role: "region", "aria-label": "Table" },
    make("table", {}, make("thead", {}, row(head, "th")), make("tbody", {}, rows.map((line) => row(line, "td")))));
}

/** A block of code with its language and a button to copy it. */
export function code(text, language = "") {
  const button = iconButton("copy", "Copy the code", () => copy(text, button));
  return make("figure", { className: "code" }, make("figcaption", {}, make("span", {}, language || "text"), button),
    make("pre", { tabIndex: 0 }, make("code", {}, text)));
}

const CLOSED = /(?:(?<=\*)(?!\*)|(?<=_)(?!\w))/.source;
const INLINE = new RegExp([
  /(?<!`)(?<ticks>`+)(?!`)(?<code>[^]{0,4999}?[^`])\k<ticks>(?!`)/.source,
  /\\(?<escaped>[!-/:-@[-`{-~])/.source,
  /!?\[(?<words>(?:[^[\]\\]|\\.|\[[^[\]]*\]){0,999})\]/.source +
    /\(\s*<?(?<target>[^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.source,
  /<?(?<address>https?:\/\/[^\s<>"`]*[^\s<>"`.,;:!?'*_)\]])>?/.source,
  /(?<two>\*\*|(?<!\w)__)(?=\S)(?<bold>[^]{0,1999}?\S)\k<two>/.source + CLOSED,
  /(?<one>\*|(?<!\w)_)(?=[^\s*])(?<italic>[^]{0,1999}?[^\s*])\k<one>/.source + CLOSED,
  /~~(?=\S)(?<struck>[^]{0,1999}?\S)~~/.source,
  /(?<newline> {0,9}\\?\n|<br ?\/?>)/.source].join("|"), "g");

/** The nodes of a run of text. */
function inline(text, depth = 0) {
  const made = [];
  let at = 0;
  for (const match of depth < DEEPEST ? text.matchAll(INLINE) : []) {
    const found = match.groups;
    made.push(text.slice(at, match.index));
    at = match.index + match[0].length;
    const inner = (words) => inline(words, depth + 1);
    if (found.code !== undefined) made.push(make("code", {}, found.code.replace(/^ (.*[^ ].*) $/, "$1")));
    else if (found.escaped) made.push(found.escaped);
    else if (found.target !== undefined) made.push(link(found.target, found.words ? inner(found.words) : [found.target], match[0]));
    else if (found.address) made.push(link(found.address, [found.address], match[0]));
    else if (found.bold) made.push(make("strong", {}, inner(found.bold)));
    else if (found.italic) made.push(make("em", {}, inner(found.italic)));
    else if (found.struck) made.push(make("del", {}, inner(found.struck)));
    else made.push(make("br"));
  }
  made.push(text.slice(at));
  return made.filter((one) => one !== "");
}

/** A link, if it goes where links may; else the text that it was. */
function link(target, children, source) {
  let href;
  try { href = new URL(target); } catch { return source; }
  if (!["http:", "https:", "mailto:"].includes(href.protocol)) return source;
  return make("a", { href: href.href, target: "_blank", rel: "noopener noreferrer nofollow" }, children);
}
