// The fields beside the chat, as fields of a request.

import { byId } from "./dom.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "max_thinking_tokens", "seed"];
const SEEDS = 2 ** 31;

// The request's fields; a seed is always there, so that every answer can be had again.
export function requestFields() {
  const fields = {};
  for (const name of NUMBERS) {
    const input = byId(name);
    if (input.validity.badInput || !input.checkValidity()) {
      input.focus();
      throw new Error(`${input.labels[0].textContent.trim()}: ${input.validationMessage}`);
    }
    if (input.value !== "") fields[name] = Number(input.value);
  }
  fields.seed ??= Math.floor(Math.random() * SEEDS);
  fields.enable_thinking = byId("thinking").checked;
  if (!fields.enable_thinking) delete fields.max_thinking_tokens;
  const adapter = byId("adapter").value;
  if (!byId("adapter-field").hidden && adapter) fields.adapter = adapter;
  if (byId("probabilities").checked) Object.assign(fields, { logprobs: true, top_logprobs: 6 });
  return fields;
}

export const systemPrompt = () => byId("system").value.trim();

// Shows what a model does where nothing is said.
export function showDefaults(facts) {
  for (const name of ["temperature", "top_p", "top_k"]) {
    byId(name).placeholder = facts ? Number(facts.sampling[name].toPrecision(4)) : "";
  }
  byId("max_tokens").placeholder = facts?.max_tokens ?? "";
}
