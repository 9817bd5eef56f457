// Tokens of an answer: where they stand in its text, and how likely they were.

import { byId, element, percent } from "./dom.js";

const BYTE = /^bytes:/;

// One channel's text (the answer, or the thoughts before it) with the tokens that made it.
export class TokenText {
  constructor() {
    this.text = "";
    this.tokens = []; // {start, end, entries, position}: in order, without gaps where all are known
    this.ends = []; // of the tokens, to find them by
  }

  // Adds what a chunk brought; `pending` are tokens that have shown no text yet. Returns those that
  // never will: special tokens.
  add(text, pending) {
    let left = pending.length;
    let rest = text;
    const made = [];
    while (rest && left) {
      const entry = pending[left - 1];
      if (BYTE.test(entry.token)) {
        // A character may need several bytes, each of them a token.
        let first = left - 1;
        while (first && BYTE.test(pending[first - 1].token)) first -= 1;
        made.unshift({ text: rest, entries: pending.slice(first, left) });
        left = first;
        rest = "";
      } else if (entry.token && rest.endsWith(entry.token)) {
        made.unshift({ text: entry.token, entries: [entry] });
        rest = rest.slice(0, rest.length - entry.token.length);
        left -= 1;
      } else if (entry.token.endsWith(rest)) { // White space at the ends of thoughts is dropped.
        made.unshift({ text: rest, entries: [entry] });
        left -= 1;
        rest = "";
      } else {
        break;
      }
    }
    this.text += rest;
    for (const { text: part, entries } of made) {
      const start = this.text.length;
      this.text += part;
      this.tokens.push({ start, end: this.text.length, entries });
      this.ends.push(this.text.length);
    }
    return pending.slice(0, left);
  }

  // Index of the first token that ends after a place of the text.
  at(place) {
    let [low, high] = [0, this.ends.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.ends[middle] > place) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  // Appends the text between two places, each token an element of its own.
  paint(parent, from, to) {
    let index = this.at(from);
    while (from < to) {
      const token = this.tokens[index];
      if (!token || token.start >= to) {
        parent.append(this.text.slice(from, to));
        return;
      }
      if (token.start > from) {
        parent.append(this.text.slice(from, token.start));
        from = token.start;
      }
      const end = Math.min(token.end, to);
      parent.append(tokenElement(token, this.text.slice(from, end)));
      from = end;
      index += 1;
    }
  }
}

const byElement = new WeakMap();

export const tokenOf = (node) => byElement.get(node);

function tokenElement(token, text) {
  const made = element("span", { class: "token", tabIndex: -1 }, text);
  const doubt = 1 - probability(token);
  if (doubt >= 0.03) made.style.setProperty("--doubt", doubt.toFixed(2));
  byElement.set(made, token);
  return made;
}

export function probability(token) {
  return Math.exp(token.entries.reduce((sum, entry) => sum + entry.logprob, 0));
}

// What was drawn when no text shows it: the end of the turn.
export function endElement(entry) {
  const token = { entries: [entry] };
  const made = element("span", { class: "token end", tabIndex: -1 }, "end");
  made.style.setProperty("--doubt", (1 - probability(token)).toFixed(2));
  byElement.set(made, token);
  return made;
}

// White space would not be seen.
function visible(text) {
  return text.replaceAll(" ", "\u2423").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5") || "\u2205";
}

// The bubble with a token's alternatives.
function alternatives(entry) {
  const rows = entry.top_logprobs.map((each) => [each.token, Math.exp(each.logprob), each.id === entry.id]);
  if (!rows.some(([, , chosen]) => chosen)) rows.push([entry.token, Math.exp(entry.logprob), true]);
  const rest = Math.max(0, 1 - rows.reduce((sum, [, share]) => sum + share, 0));
  const list = element("ol", { class: "bars" });
  for (const [text, share, chosen] of [...rows, [null, rest, false]]) {
    const bar = element("span", { class: "fill" });
    bar.style.setProperty("--share", share.toFixed(4));
    list.append(element("li", { class: chosen ? "chosen" : text === null ? "rest" : "" },
      element("span", { class: "word" }, text === null ? "all others" : visible(text)),
      element("span", { class: "track" }, bar),
      element("span", { class: "share" }, percent(share))));
  }
  return list;
}

export function tokenTip(token) {
  const [entry, ...more] = token.entries;
  const parts = [element("p", { class: "tip-head" },
    element("strong", {}, visible(token.entries.map((each) => each.token).join(""))),
    element("span", {}, `id ${token.entries.map((each) => each.id).join(", ")}`))];
  parts.push(alternatives(entry));
  if (more.length) parts.push(element("p", {}, `The first of ${more.length + 1} tokens of one character.`));
  return parts;
}

// The one bubble of the page.
export const tip = {
  show(anchor, children) {
    const bubble = byId("tip");
    bubble.replaceChildren(...children);
    bubble.hidden = false;
    const box = bubble.getBoundingClientRect();
    const middle = (anchor.left + anchor.right) / 2;
    const left = Math.min(Math.max(8, middle - box.width / 2), innerWidth - box.width - 8);
    const above = anchor.top - box.height - 8;
    bubble.style.left = `${left}px`;
    bubble.style.top = `${above < 8 ? Math.min(anchor.bottom + 8, innerHeight - box.height - 8) : above}px`;
  },
  hide() {
    byId("tip").hidden = true;
  },
};
