// One answer: its state while it streams, and what is seen of it.

import { copyText, element, iconButton, oncePerFrame } from "./dom.js";
import { Markup } from "./markup.js";
import { Routing } from "./experts.js";
import { TokenText, endElement } from "./tokens.js";

const ENDS = {
  stop: "complete",
  length: "cut at the token limit",
  cancelled: "stopped",
  tool_calls: "called a tool",
  error: "failed",
};

export class Answer {
  constructor(request, facts) {
    this.role = "assistant";
    this.request = request;
    this.answer = new TokenText();
    this.thoughts = new TokenText();
    this.routing = facts?.experts ? new Routing(facts) : null;
    this.pending = [];
    this.tokens = []; // every token's entry, special ones included
    this.finish = null;
    this.usage = null;
    this.timings = null; // as the server measured them
    this.failure = null;
    this.warning = null;
    this.times = { asked: performance.now(), first: null, last: null, thought: null };
    this.count = 0;
    this.make();
    this.draw = oncePerFrame(() => this.paint());
  }

  get text() {
    return this.answer.text;
  }

  get isEmpty() {
    return !this.answer.text && !this.thoughts.text;
  }

  take(chunk) {
    if (chunk.usage) {
      this.usage = chunk.usage;
      this.timings = chunk.gemloupe?.timings?.[0] ?? null;
    }
    const [choice] = chunk.choices;
    if (!choice) return;
    if (choice.gemloupe?.routing && this.routing) this.routing.add(choice.gemloupe.routing);
    const entries = choice.logprobs?.content ?? [];
    for (const entry of entries) {
      entry.index = this.tokens.length;
      this.tokens.push(entry);
    }
    this.pending.push(...entries);
    const { content, reasoning_content: reasoning } = choice.delta;
    if (content || reasoning || entries.length) {
      this.times.last = performance.now();
      this.times.first ??= this.times.last;
      this.count += entries.length || 1;
    }
    if (reasoning) {
      this.thoughts.add(reasoning, this.pending);
      this.pending = [];
    }
    if (content) {
      this.times.thought ??= performance.now();
      this.answer.add(content, this.pending);
      this.pending = [];
    }
    if (choice.finish_reason) this.finish = choice.finish_reason;
    this.draw();
  }

  // Nothing follows.
  end(finish = null, failure = null) {
    this.finish ??= finish;
    this.failure = failure;
    this.ended = true;
    this.paint();
  }

  position(token) {
    const index = token.entries[0].index;
    return this.routing?.begin === null || index === undefined ? null : this.routing?.begin + index;
  }

  // What is seen.

  make() {
    this.summary = element("summary", {}, "Thinking");
    this.thoughtBody = element("div", { class: "prose thoughts", tabIndex: 0, role: "group" });
    this.thoughtBody.setAttribute("aria-label", "Thoughts; arrow keys move from token to token");
    this.details = element("details", { class: "thinking", hidden: true }, this.summary, this.thoughtBody);
    this.summary.addEventListener("click", () => (this.touched = true));
    this.body = element("div", { class: "prose", tabIndex: 0, role: "group" });
    this.body.setAttribute("aria-label", "Answer; arrow keys move from token to token");
    this.waiting = element("p", { class: "waiting", "aria-label": "Reading the prompt" },
      element("i"), element("i"), element("i"));
    this.problem = element("div", { class: "problem", role: "alert", hidden: true });
    this.tools = element("div", { class: "tools" });
    this.stats = element("p", { class: "stats" });
    this.foot = element("div", { class: "foot-line", hidden: true }, this.stats, this.tools);
    this.node = element("article", { class: "message assistant", "aria-label": "Answer" },
      this.details, this.waiting, this.body, this.problem, this.foot);
    this.bodyMarkup = new Markup(this.body, (...where) => this.answer.paint(...where));
    this.thoughtMarkup = new Markup(this.thoughtBody, (...where) => this.thoughts.paint(...where));
  }

  paint() {
    this.waiting.hidden = Boolean(this.ended || !this.isEmpty);
    if (this.thoughts.text) {
      this.details.hidden = false;
      this.thoughtMarkup.show(this.thoughts.text);
      const seconds = ((this.times.thought ?? this.times.last) - this.times.first) / 1000;
      const thinks = !this.answer.text && !this.ended;
      const length = seconds < 0.1 ? "Thoughts" : `Thought for ${seconds.toFixed(1)} s`;
      this.summary.textContent = thinks ? "Thinking…" : length;
      this.summary.classList.toggle("live", thinks);
      if (!this.touched) this.details.open = !this.answer.text;
    }
    if (this.answer.text) this.bodyMarkup.show(this.answer.text);
    this.body.hidden = !this.answer.text;
    this.node.classList.toggle("streaming", !this.ended);
    if (this.ended && this.pending.length && this.finish === "stop" && this.answer.text) {
      this.endMark ??= endElement(this.pending.at(-1));
      const last = this.body.lastElementChild;
      (last.matches("p, h3, h4, h5, h6, blockquote") ? last : this.body).append(this.endMark);
    }
    this.foot.hidden = this.isEmpty && (!this.ended || this.finish === "error");
    this.stats.replaceChildren(...this.figures().map((text) => element("span", {}, text)));
    if (this.ended && !this.tools.children.length && this.answer.text) {
      const copy = iconButton("copy", "Copy", () => copyText(this.answer.text, copy));
      this.tools.append(copy);
    }
  }

  figures() {
    const { first, last, asked } = this.times;
    const count = this.usage?.completion_tokens ?? this.count;
    const seconds = this.timings?.decode_seconds ?? (last - first) / 1000;
    const decoded = this.timings?.decode_tokens ?? count - 1;
    const figures = [];
    if (count) figures.push(`${count} token${count === 1 ? "" : "s"}`);
    if (decoded > 1 && seconds > 0) figures.push(`${speed(decoded / seconds)} tokens/s`);
    if (this.usage) figures.push(`${this.usage.prompt_tokens} prompt tokens`);
    if (this.ended && first !== null) figures.push(`first after ${((first - asked) / 1000).toFixed(2)} s`);
    if (this.finish) figures.push(ENDS[this.finish] ?? this.finish);
    if (this.ended && this.count) figures.push(`seed ${this.request.seed}`);
    return figures;
  }

  toJSON() {
    return {
      role: "assistant",
      content: this.answer.text,
      ...(this.thoughts.text ? { reasoning_content: this.thoughts.text } : {}),
      finish_reason: this.finish,
      usage: this.usage,
      seconds: this.times.last === null ? null : {
        to_first_token: (this.times.first - this.times.asked) / 1000,
        of_answer: (this.times.last - this.times.first) / 1000,
      },
      timings: this.timings,
      request: this.request,
      ...(this.tokens.length ? { logprobs: this.tokens } : {}),
      ...(this.routing?.tokens.size ? { routing: this.routing } : {}),
      ...(this.failure ? { error: this.failure.message } : {}),
      ...(this.warning ? { warning: this.warning } : {}),
    };
  }
}

const speed = (value) => (value < 10 ? value.toFixed(1) : Math.round(value));
