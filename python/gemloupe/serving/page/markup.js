// A few forms of Markdown as elements. Texts are hostile: they become text nodes, links stay text.
//
// Every piece of text keeps its place in the source, so that tokens can be found in it again.

import { copyText, element, iconButton } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(?=\S)/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+)/;
const QUOTE = /^ {0,3}> ?/;
// Longer runs of marks are hardly meant as such, and hostile ones would take long.
const LONGEST_SPAN = 4000;
const LONGEST_TABLE_RULE = 500;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$/;

// Shows a text that grows at its end; only what changed is made anew.
export class Markup {
  // paint(parent, from, to) appends the source's text between two places.
  constructor(root, paint) {
    this.root = root;
    this.paint = paint;
    this.blocks = [];
  }

  show(text) {
    const blocks = parseBlocks(text);
    let kept = 0;
    while (kept < blocks.length && kept < this.blocks.length) {
      const [now, before] = [blocks[kept], this.blocks[kept]];
      if (now.start !== before.start || now.end !== before.end || now.kind !== before.kind) break;
      // What stands last may still get tokens.
      if (kept === blocks.length - 1) break;
      now.made = before.made;
      kept += 1;
    }
    for (const old of this.blocks.slice(kept)) old.made.remove();
    for (const block of blocks.slice(kept)) {
      block.made = this.make(block, text);
      this.root.append(block.made);
    }
    this.blocks = blocks;
  }

  make(block, text) {
    if (block.kind === "rule") return element("hr");
    if (block.kind === "code") return this.code(block, text);
    if (block.kind === "list") return this.list(block.items, text);
    if (block.kind === "table") return this.table(block, text);
    const made = element(block.kind === "heading" ? `h${Math.min(6, block.level + 2)}` :
      block.kind === "quote" ? "blockquote" : "p");
    this.lines(made, text, block.lines);
    return made;
  }

  lines(parent, text, lines) {
    lines.forEach(([from, to], index) => {
      const before = lines[index - 1]?.[1];
      if (index) this.paint(parent, before, text.indexOf("\n", before) + 1);
      this.inline(parent, text, from, to);
    });
  }

  code(block, text) {
    const code = element("code");
    const [from, to] = block.body;
    this.paint(code, from, to);
    const source = text.slice(from, to);
    const copy = iconButton("copy", "Copy", () => copyText(source, copy));
    const head = element("div", { class: "code-head" }, element("span", {}, block.language), copy);
    return element("div", { class: "code" }, head, element("pre", { tabIndex: 0 }, code));
  }

  list(items, text) {
    const ordered = items[0].number !== null;
    const list = element(ordered ? "ol" : "ul");
    if (ordered && items[0].number !== 1) list.start = items[0].number;
    for (const item of items) {
      const made = element("li");
      this.lines(made, text, item.lines);
      if (item.children.length) made.append(this.list(item.children, text));
      list.append(made);
    }
    return list;
  }

  table(block, text) {
    const row = ([from, to], tag) => {
      const made = element("tr");
      for (const [begin, end] of cells(text, from, to)) {
        const cell = element(tag);
        this.inline(cell, text, begin, end);
        made.append(cell);
      }
      return made;
    };
    const [head, , ...rest] = block.lines;
    const body = element("tbody", {}, ...rest.map((line) => row(line, "td")));
    const table = element("table", {}, element("thead", {}, row(head, "th")), body);
    return element("div", { class: "table", tabIndex: 0 }, table);
  }

  // Code, bold and italic text between two places of one line.
  inline(parent, text, from, to) {
    let plain = from;
    let at = from;
    const flush = (end) => {
      if (end > plain) this.paint(parent, plain, end);
    };
    while (at < to) {
      const found = span(text, at, to);
      if (!found) {
        at += 1;
        continue;
      }
      flush(at);
      const made = element(found.tag);
      if (found.tag === "code") this.paint(made, found.from, found.to);
      else this.inline(made, text, found.from, found.to);
      parent.append(made);
      at = plain = found.end;
    }
    flush(to);
  }
}

// What begins at `at` of a line that ends at `to`: {tag, from, to, end}, or null.
function span(text, at, lineEnd) {
  const mark = text[at];
  const to = Math.min(lineEnd, at + LONGEST_SPAN);
  if (mark === "`") {
    let width = 1;
    while (text[at + width] === "`") width += 1;
    const close = text.indexOf("`".repeat(width), at + width);
    if (close < 0 || close >= to || close === at + width) return null;
    return { tag: "code", from: at + width, to: close, end: close + width };
  }
  if (mark !== "*" && mark !== "_") return null;
  const before = text[at - 1];
  const inWord = Boolean(before && /\w/.test(before));
  if (before === mark || (mark === "_" && inWord)) return null;
  for (const [width, tag] of [[2, "strong"], [1, "em"]]) {
    const marks = mark.repeat(width);
    if (!text.startsWith(marks, at)) continue;
    // 2*3*4 is no emphasis.
    if (width === 1 && (text[at + 1] === mark || inWord)) continue;
    const from = at + width;
    if (from >= to || /\s/.test(text[from])) continue;
    for (let close = text.indexOf(marks, from + 1); close > 0 && close + width <= to;
      close = text.indexOf(marks, close + 1)) {
      if (/\s/.test(text[close - 1])) continue;
      if (width === 1 && (text[close + 1] === mark || text[close - 1] === mark)) continue;
      const after = text[close + width];
      if ((mark === "_" || width === 1) && after && /\w/.test(after)) continue;
      return { tag, from, to: close, end: close + width };
    }
  }
  return null;
}

function cells(text, from, to) {
  const found = [];
  let begin = from;
  for (let at = from; at <= to; at += 1) {
    if (at < to && (text[at] !== "|" || text[at - 1] === "\\")) continue;
    found.push(trimmed(text, begin, at));
    begin = at + 1;
  }
  const isEmpty = ([start, end]) => start >= end;
  if (found.length > 1 && isEmpty(found[0])) found.shift();
  if (found.length > 1 && isEmpty(found[found.length - 1])) found.pop();
  return found;
}

function trimmed(text, from, to) {
  while (from < to && /\s/.test(text[from])) from += 1;
  while (to > from && /\s/.test(text[to - 1])) to -= 1;
  return [from, to];
}

// [{kind, start, end, …}]: code, heading, rule, list, quote, table, text.
export function parseBlocks(text) {
  const lines = [];
  for (let start = 0; start <= text.length;) {
    let end = text.indexOf("\n", start);
    if (end < 0) end = text.length;
    lines.push({ start, end, text: text.slice(start, end) });
    start = end + 1;
  }
  const blocks = [];
  let open = null;
  const begin = (kind, line, more = {}) => {
    open = { kind, start: line.start, end: line.end, lines: [], ...more };
    blocks.push(open);
  };
  for (let i = 0; i < lines.length; i += 1) {
    const line = lines[i];
    const fence = FENCE.exec(line.text);
    if (fence) {
      let last = i + 1;
      const closes = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      while (last < lines.length && !closes.test(lines[last].text)) last += 1;
      const closed = last < lines.length;
      const end = closed ? lines[last].end : text.length;
      const from = Math.min(line.end + 1, text.length);
      const to = Math.max(from, closed ? lines[last].start - 1 : text.length);
      begin("code", line, { end, language: fence[2].trim(), body: [from, to] });
      open = null;
      i = last;
      continue;
    }
    if (!line.text.trim()) {
      if (open?.kind !== "list") open = null;
      else open.gap = true;
      continue;
    }
    const heading = HEADING.exec(line.text);
    const item = RULE.test(line.text) ? null : ITEM.exec(line.text);
    if (heading) {
      const from = line.start + heading[0].length;
      begin("heading", line, { level: heading[1].length });
      open.lines.push([from, line.end]);
      open = null;
    } else if (RULE.test(line.text)) {
      begin("rule", line);
      open = null;
    } else if (item && (open?.kind === "list" || !item[1] || item[1].length < 4)) {
      if (open?.kind !== "list") begin("list", line, { items: [] });
      addItem(open, line, item);
    } else if (open?.kind === "list" && (!open.gap || /^\s/.test(line.text))) {
      open.latest.lines.push(trimmed(text, line.start, line.end));
      open.end = line.end;
    } else if (QUOTE.test(line.text)) {
      if (open?.kind !== "quote") begin("quote", line);
      open.lines.push([line.start + QUOTE.exec(line.text)[0].length, line.end]);
      open.end = line.end;
    } else if (open?.kind === "table" ||
      (line.text.includes("|") && isTableRule(lines[i + 1]))) {
      if (open?.kind !== "table") begin("table", line);
      open.lines.push([line.start, line.end]);
      open.end = line.end;
    } else {
      if (open?.kind !== "text") begin("text", line);
      open.lines.push([line.start, line.end]);
      open.end = line.end;
    }
  }
  return blocks;
}

function isTableRule(line) {
  return line !== undefined && line.text.length < LONGEST_TABLE_RULE && TABLE_RULE.test(line.text);
}

function addItem(list, line, [all, indent, mark]) {
  const width = indent.replaceAll("\t", "    ").length;
  const number = /\d/.test(mark) ? Number.parseInt(mark, 10) : null;
  const item = { width, number, children: [], lines: [[line.start + all.length, line.end]] };
  const path = list.path ?? [];
  while (path.length && path[path.length - 1].width >= width) path.pop();
  const siblings = path.length ? path[path.length - 1].children : list.items;
  siblings.push(item);
  path.push(item);
  Object.assign(list, { path, latest: item, end: line.end, gap: false });
}
