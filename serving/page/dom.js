// Elements are built from constants and text; nothing in the page parses text as markup.

import { t } from "./language.js";

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  check: "M5 12.500l4.500 4.500L19 7.500",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  retry: "M20 12a8 8 0 1 1-2.500-5.800M20 3v4.500h-4.500",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v5M14 11v5",
  save: "M12 4v11M7.500 10.500L12 15l4.500-4.500M4 20h16",
  chevron: "M9 6l6 6-6 6",
};

export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  // Children first: with dir="auto" a browser reads all of them again for each that is added.
  node.append(...children.filter((child) => child !== null && child !== undefined));
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else if (name === "text") node.textContent = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  return node;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

export function iconButton(name, label, click) {
  return el("button", { type: "button", class: "quiet", "aria-label": label, title: label, click }, icon(name));
}

export const byId = (id) => document.getElementById(id);

// Outside https and localhost browsers have no clipboard interface; a hidden field does the same there.
export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) {
    try {
      await navigator.clipboard.writeText(text);
      return;
    } catch {
      // Refused by the browser: the field below still may.
    }
  }
  const field = el("textarea", { class: "offscreen", "aria-hidden": "true", readonly: true });
  field.value = text;
  const focused = document.activeElement;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  if (!copied) throw new Error("the browser refused to copy");
}

export function copyButton(label, getText) {
  const button = iconButton("copy", label, async () => {
    let isCopied = true;
    try {
      await copyText(getText());
    } catch {
      isCopied = false;
    }
    button.replaceChildren(icon(isCopied ? "check" : "copy"));
    announce(isCopied ? t("Copied") : t("Not copied: the browser refused"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

// What a screen reader says; the answer itself is no live region, since it changes with every token.
export function announce(text) {
  byId("status").textContent = text;
}

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/x-ndjson;charset=utf-8" }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
