// Elements without markup: every text becomes a text node.

export const byId = (id) => document.getElementById(id);

// element("p", {class: "note", hidden: true}, "text", otherElement)
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onclick) {
  return element("button", { type: "button", class: "quiet small", title: label, onclick },
    icon(name), element("span", {}, label));
}

const REST = 6; // times as long as it took
const LONGEST_REST = 500; // ms

// Calls `draw` once in the next frame, however often it is asked for. What takes long rests long
// after it: the model computes on the same machine.
export function oncePerFrame(draw) {
  let asked = false;
  let rested = 0;
  const run = () => {
    asked = false;
    const began = performance.now();
    draw();
    const ended = performance.now();
    rested = ended + Math.min(LONGEST_REST, (ended - began) * REST);
  };
  return () => {
    if (asked) return;
    asked = true;
    const wait = rested - performance.now();
    if (wait > 16) setTimeout(run, wait);
    else requestAnimationFrame(run);
  };
}

export async function copyText(text, button) {
  const label = button.querySelector("span");
  const before = label.textContent;
  try {
    await navigator.clipboard.writeText(text);
    label.textContent = "Copied";
  } catch {
    label.textContent = "The browser refused";
  }
  setTimeout(() => (label.textContent = before), 1600);
}

export function percent(share) {
  const value = share * 100;
  if (value > 0 && value < 0.1) return "< 0.1 %";
  return `${value < 10 || (value > 99 && value < 100) ? value.toFixed(1) : Math.round(value)} %`;
}
