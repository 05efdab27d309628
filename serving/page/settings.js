// The panel of settings: system message, thinking, sampling, tools, key. What is left empty is not sent.
import { byId } from "./dom.js";
import { t } from "./language.js";

const NUMBERS = [
  "temperature", "top_p", "top_k", "max_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
];
const CHOICES = ["thinking", "reasoning_effort"];

// changed(change) for every valid change: a function that makes it in an object of settings. The system message belongs to the conversation, see chat.js.
export function connectSettings(settings, changed) {
  const form = byId("settings-form");
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const name of [...NUMBERS, "stop"]) form.elements[name].value = settings.sampling[name] ?? "";
  for (const name of CHOICES) form.elements[name].value = settings[name];
  form.elements.tools.value = settings.tools;
  form.addEventListener("input", ({ target }) => {
    const fault = faultOf(target);
    const note = byId(`${target.name}-fault`);
    target.setCustomValidity(fault);
    target.setAttribute("aria-invalid", String(Boolean(fault)));
    if (note) note.textContent = fault;
    if (fault || target.name === "system") return;
    const { name, value } = target;
    changed((each) => {
      if (name === "tools" || CHOICES.includes(name)) each[name] = value;
      else if (value === "") delete each.sampling[name];
      else each.sampling[name] = value;
    });
  });
  byId("reset-settings").addEventListener("click", () => {
    for (const name of [...NUMBERS, "stop", ...CHOICES]) {
      form.elements[name].value = "";
      form.elements[name].dispatchEvent(new Event("input", { bubbles: true }));
    }
  });
}

function faultOf(field) {
  if (NUMBERS.includes(field.name)) {
    field.setCustomValidity("");
    const { min, max } = field;
    if (field.checkValidity()) return "";
    if (field.validity.stepMismatch) return t("A whole number is needed.");
    if (field.validity.badInput) return t("A number is needed.");
    return max ? t("Between {min} and {max}.", { min, max }) : t("At least {min}.", { min });
  }
  if (field.name === "tools" && field.value.trim()) {
    try {
      if (!Array.isArray(JSON.parse(field.value))) return t("A list of functions is needed: [ ... ].");
    } catch (error) {
      return t("This is no JSON: {fault}", { fault: error.message });
    }
  }
  return "";
}

// The part of a request that the settings make.
export function requestSettings(settings) {
  const part = {};
  for (const name of NUMBERS) {
    if (settings.sampling[name] !== undefined) part[name] = Number(settings.sampling[name]);
  }
  const stop = (settings.sampling.stop ?? "").split("\n").filter(Boolean);
  if (stop.length) part.stop = stop;
  if (settings.tools.trim()) part.tools = JSON.parse(settings.tools);
  if (settings.reasoning_effort) part.reasoning_effort = settings.reasoning_effort;
  if (settings.thinking) part.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  return part;
}
