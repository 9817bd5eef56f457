// The map of experts: which of them the tokens of an answer were given, layer by layer.

import { byId, element, oncePerFrame, percent } from "./dom.js";
import { tip } from "./tokens.js";

const ARRAYS = { uint8: Uint8Array, uint16: Uint16Array };
const REDRAW_MS = 80;
const LEFT = 20; // room for the layers' numbers
const BELOW = 16; // and for the experts'

// What one answer's tokens were given.
export class Routing {
  constructor({ experts, expert_layers: layers }) {
    this.experts = experts;
    this.layers = layers;
    this.chosen = 0; // experts of one token in one layer
    this.begin = null; // position of the answer's first token
    this.last = null; // position of the token read last
    this.tokens = new Map(); // position -> experts [L · k]
    this.counts = {}; // "all" and "answer": tokens of each expert [L · E]
    this.read = { all: 0, answer: 0 };
    for (const kind of ["all", "answer"]) this.counts[kind] = new Uint32Array(layers.length * experts);
  }

  // Takes a chunk's {positions [T], experts [L, T, k]}. The first one is of the prompt.
  add({ positions, experts: { dtype, shape, data } }) {
    const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
    const values = new ARRAYS[dtype](bytes.buffer);
    const [layers, count, chosen] = shape;
    this.chosen = chosen;
    if (this.begin === null) this.begin = positions[count - 1] + 1;
    for (let t = 0; t < count; t += 1) {
      const own = new Uint16Array(layers * chosen);
      const ofAnswer = positions[t] >= this.begin;
      for (let layer = 0; layer < layers; layer += 1) {
        for (let i = 0; i < chosen; i += 1) {
          const expert = values[(layer * count + t) * chosen + i];
          own[layer * chosen + i] = expert;
          this.counts.all[layer * this.experts + expert] += 1;
          if (ofAnswer) this.counts.answer[layer * this.experts + expert] += 1;
        }
      }
      this.read.all += 1;
      this.read.answer += ofAnswer;
      this.tokens.set(positions[t], own);
    }
    this.last = positions[count - 1];
  }

  toJSON() {
    const tokens = [...this.tokens].map(([position, own]) => ({ position, experts: [...own] }));
    return { layers: this.layers, experts: this.experts, chosen: this.chosen, tokens };
  }
}

export class ExpertMap {
  constructor() {
    this.canvas = byId("experts-map");
    this.routing = null;
    this.live = false;
    this.position = null; // of the token that is pointed at
    this.cell = null; // {layer, expert} that is pointed at
    this.drawn = 0;
    this.draw = oncePerFrame(() => this.paint());
    new ResizeObserver(this.draw).observe(this.canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", this.draw);
    for (const input of document.getElementsByName("experts-of")) input.addEventListener("change", this.draw);
    this.canvas.addEventListener("pointermove", (event) => this.point(this.under(event), event));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("blur", () => this.point(null));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
    byId("experts-wide").addEventListener("click", ({ currentTarget }) => {
      const wide = document.body.classList.toggle("wide");
      currentTarget.setAttribute("aria-pressed", wide);
      this.draw();
    });
  }

  // Shows the section for a model with experts alone.
  forModel(facts) {
    const { experts, expert_layers: layers } = facts ?? { experts: 0, expert_layers: [] };
    byId("experts").hidden = !experts;
    this.shape = { experts, layers };
    this.show(null);
  }

  show(routing, live = false) {
    this.routing = routing;
    this.live = live;
    this.draw();
  }

  // New tokens came; a busy machine draws seldom.
  update() {
    if (performance.now() - this.drawn > REDRAW_MS) this.draw();
  }

  highlight(position) {
    if (this.position === position) return;
    this.position = position;
    this.draw();
  }

  get kind() {
    return document.querySelector("input[name=experts-of]:checked").value;
  }

  size() {
    const { experts, layers } = this.shape;
    const width = this.canvas.parentElement.clientWidth;
    const row = layers.length > 12 ? 11 : 19;
    return { width, row, height: row * layers.length + BELOW, cell: (width - LEFT) / experts };
  }

  paint() {
    const { experts, layers } = this.shape ?? { experts: 0, layers: [] };
    if (!experts || byId("experts").hidden) return;
    this.drawn = performance.now();
    const { width, row, height, cell } = this.size();
    if (cell <= 0) return;
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    const style = getComputedStyle(document.documentElement);
    this.label(context, style);
    context.translate(LEFT, 0);
    const ramp = ["--heat-0", "--heat-1", "--heat-2"].map((name) =>
      style.getPropertyValue(name).trim().split(/\s+/).map(Number));
    const counts = this.routing?.counts[this.kind];
    const read = this.routing?.read[this.kind] || 0;
    const most = counts ? counts.reduce((a, b) => Math.max(a, b), 0) : 0;
    const gap = cell > 5 ? 1.5 : cell > 3 ? 0.5 : 0;
    for (let layer = 0; layer < layers.length; layer += 1) {
      for (let expert = 0; expert < experts; expert += 1) {
        const count = counts ? counts[layer * experts + expert] : 0;
        context.fillStyle = shade(ramp, most ? count / most : 0);
        // On whole pixels, or small cells would blur into stripes.
        const from = Math.round(expert * cell * scale) / scale;
        const to = Math.round((expert + 1) * cell * scale) / scale;
        context.fillRect(from, layer * row, to - from - gap, row - 1.5);
      }
    }
    const marked = this.position ?? (this.live ? this.routing?.last : null);
    const own = this.routing?.tokens.get(marked);
    if (own) {
      context.strokeStyle = style.getPropertyValue("--amber");
      context.lineWidth = 1.5;
      own.forEach((expert, index) => {
        const layer = Math.floor(index / this.routing.chosen);
        outline(context, expert * cell, layer * row, cell - gap, row - 1.5);
      });
    }
    if (this.cell) {
      context.strokeStyle = style.getPropertyValue("--text");
      context.lineWidth = 1.5;
      outline(context, this.cell.expert * cell, this.cell.layer * row, cell - gap, row - 1.5);
    }
    this.say(counts, read, most);
  }

  label(context, style) {
    const { experts, layers } = this.shape;
    const { row, cell, height } = this.size();
    context.fillStyle = style.getPropertyValue("--muted");
    context.font = `10px ${style.getPropertyValue("--sans")}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const everyLayer = layers.length > 12 ? 5 : 1;
    for (let i = 0; i < layers.length; i += everyLayer) {
      context.fillText(layers[i], LEFT - 6, (i + 0.5) * row);
    }
    context.textAlign = "center";
    const everyExpert = Math.max(1, Math.ceil(experts / 8));
    for (let i = 0; i < experts; i += everyExpert) {
      context.fillText(i, LEFT + (i + 0.5) * cell, height - BELOW / 2 + 2);
    }
  }

  say(counts, read, most) {
    const { experts, layers } = this.shape;
    const each = this.routing?.chosen ? `, ${this.routing.chosen} a token` : "";
    byId("experts-about").textContent = `${layers.length} layers (rows) of ${experts} experts (columns)${each}`;
    byId("experts-most").textContent = read ? percent(most / read) : "100 %";
    const reading = byId("experts-reading");
    if (this.cell) {
      reading.textContent = this.describe(this.cell);
    } else if (!read) {
      reading.textContent = "Fills while an answer comes.";
    } else {
      const busiest = counts.indexOf(most);
      const [layer, expert] = [layers[Math.floor(busiest / experts)], busiest % experts];
      const tokens = `${read} token${read === 1 ? "" : "s"} read`;
      reading.textContent = `${tokens}; busiest: layer ${layer}, expert ${expert}`;
    }
  }

  describe({ layer, expert }) {
    const at = `Layer ${this.shape.layers[layer]}, expert ${expert}`;
    const read = this.routing?.read[this.kind] || 0;
    if (!read) return `${at}: no tokens yet`;
    const count = this.routing.counts[this.kind][layer * this.shape.experts + expert];
    return `${at}: ${count} of ${read} tokens, ${percent(count / read)}`;
  }

  under(event) {
    const { experts, layers } = this.shape;
    const { row, cell } = this.size();
    const expert = Math.min(experts - 1, Math.max(0, Math.floor((event.offsetX - LEFT) / cell)));
    const layer = Math.min(layers.length - 1, Math.max(0, Math.floor(event.offsetY / row)));
    return { layer, expert };
  }

  point(cell) {
    this.cell = cell;
    if (cell) {
      const box = this.canvas.getBoundingClientRect();
      const { row, cell: wide } = this.size();
      const left = box.left + LEFT + cell.expert * wide;
      const top = box.top + cell.layer * row;
      tip.show({ left, right: left + wide, top, bottom: top + row }, [element("p", {}, this.describe(cell))]);
    } else {
      tip.hide();
    }
    this.draw();
  }

  move(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const { layer, expert } = this.cell ?? { layer: 0, expert: -step[1] };
    const { experts, layers } = this.shape;
    this.point({
      layer: Math.min(layers.length - 1, Math.max(0, layer + step[0])),
      expert: Math.min(experts - 1, Math.max(0, expert + step[1])),
    });
  }
}

function outline(context, x, y, width, height) {
  const inset = width > 4 ? 0.75 : 0;
  context.strokeRect(x + inset, y + 0.75, Math.max(1, width - 2 * inset), height - 1.5);
}

// Between three colours; small shares are told from none.
function shade(ramp, share) {
  if (!share) return `rgb(${ramp[0].join(" ")})`;
  const at = 0.12 + 0.88 * Math.sqrt(share);
  const [from, to] = at < 0.5 ? [ramp[0], ramp[1]] : [ramp[1], ramp[2]];
  const part = at < 0.5 ? at * 2 : at * 2 - 1;
  return `rgb(${from.map((value, i) => Math.round(value + (to[i] - value) * part)).join(" ")})`;
}
