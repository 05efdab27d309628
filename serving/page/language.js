// The page's texts in the reader's language. The sources have them in English, the dictionaries by the English text. What
// the server and the model say is shown as it is.
import { CHINESE } from "./chinese.js";
import { JAPANESE } from "./japanese.js";

const DICTIONARIES = { zh: CHINESE, ja: JAPANESE };
const TAGS = { en: "en", zh: "zh-Hans", ja: "ja" };
const ATTRIBUTES = ["aria-label", "title", "placeholder"];

// The first of the browser's languages that the page knows.
const language = navigator.languages.map((tag) => tag.split("-")[0]).find((code) => code in TAGS) ?? "en";
const dictionary = DICTIONARIES[language] ?? {};

// Returns a text in the reader's language; {name} in it becomes values.name.
export function t(text, values = {}) {
  return (dictionary[text] ?? text).replace(/\{(\w+)\}/g, (place, name) => String(values[name] ?? place));
}

// Translates what index.html shows.
export function translatePage() {
  document.documentElement.lang = TAGS[language];
  document.title = t(document.title);
  const nodes = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (nodes.nextNode()) {
    const { currentNode: node } = nodes;
    const text = node.data.trim();
    if (text) node.data = node.data.replace(text, () => t(text));
  }
  for (const name of ATTRIBUTES) {
    for (const element of document.querySelectorAll(`[${name}]`)) element.setAttribute(name, t(element.getAttribute(name)));
  }
}
