// A subset of Markdown as elements. Text reaches the page as text nodes only; addresses only as http, https and mailto.
import { parseBlocks } from "./blocks.js";
import { copyButton, el } from "./dom.js";
import { t } from "./language.js";

const LONGEST_ADDRESS = 2000;
const DEEPEST = 12;
const PAIRS = [["***", "strong"], ["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const LONGEST_LABEL = 1000;
const ADDRESS = /https?:\/\/[^\s<>"'`|\\^{}\u3000-\u303f\uff00-\uffef]{1,2000}/y;
const TARGET = /<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?\)/y;
// Where something other than plain text may begin.
const SPECIAL = /[\\`*_~[!\n]|https?:\/\//g;

export function safeAddress(address) {
  if (address.length > LONGEST_ADDRESS || !/^(https?:\/\/|mailto:)/i.test(address)) return null;
  try {
    const url = new URL(address);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function link(href, ...children) {
  return el("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

// Returns nodes. A mark whose end was not found once is not looked for again, so the time is linear in the text.
export function renderInline(text, depth = 0, isLink = false) {
  const nodes = [];
  const missing = new Set();
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  };
  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text)?.index ?? text.length;
    plain += text.slice(at, next);
    at = next;
    if (at === text.length) break;
    const found = depth < DEEPEST ? specialAt(text, at, missing, depth, isLink) : null;
    if (found) {
      if (typeof found.node === "string") {
        plain += found.node;
      } else {
        flush();
        nodes.push(found.node);
      }
      at = found.end;
    } else {
      // The whole run of one mark is text, so that "****" is not taken apart.
      const character = text[at];
      do plain += text[at++];
      while (at < text.length && text[at] === character && character !== "\n" && character !== "[");
    }
  }
  flush();
  return nodes;
}

function specialAt(text, at, missing, depth, isLink) {
  switch (text[at]) {
    case "\n":
      return { node: el("br"), end: at + 1 };
    case "\\":
      return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? { node: text[at + 1], end: at + 2 } : null;
    case "`":
      return codeAt(text, at, missing);
    case "!":
      return text[at + 1] === "[" && !isLink ? linkAt(text, at + 1, depth) : null;
    case "[":
      return isLink ? null : linkAt(text, at, depth);
    case "h":
      return isLink ? null : addressAt(text, at);
    default:
      return emphasisAt(text, at, missing, depth, isLink);
  }
}

function codeAt(text, at, missing) {
  let length = 1;
  while (text[at + length] === "`") length += 1;
  const marks = "`".repeat(length);
  if (missing.has(marks)) return null;
  let end = text.indexOf(marks, at + length);
  while (end !== -1 && text[end + length] === "`") {
    let after = end + length;
    while (text[after] === "`") after += 1;
    end = text.indexOf(marks, after);
  }
  if (end === -1) {
    missing.add(marks);
    return null;
  }
  const inner = text.slice(at + length, end).replaceAll("\n", " ");
  const padded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim() ? inner.slice(1, -1) : inner;
  return { node: el("code", { text: padded, dir: "auto" }), end: end + length };
}

// An image is a link as well: nothing is loaded from elsewhere.
function linkAt(text, at, depth) {
  const label = text.slice(at + 1, at + 1 + LONGEST_LABEL);
  const middle = label.indexOf("](");
  if (middle === -1 || label.lastIndexOf("[", middle) !== -1) return null;
  TARGET.lastIndex = at + 1 + middle + 2;
  const target = TARGET.exec(text);
  const href = target && safeAddress(target[1]);
  if (!href) return null;
  const children = renderInline(label.slice(0, middle), depth + 1, true);
  return { node: link(href, ...(children.length ? children : [href])), end: TARGET.lastIndex };
}

function addressAt(text, at) {
  ADDRESS.lastIndex = at;
  let address = ADDRESS.exec(text)?.[0].replace(/[.,;:!?*_~'\]]+$/, "");
  if (address?.endsWith(")") && !address.includes("(")) address = address.replace(/\)+$/, "");
  const href = address && safeAddress(address);
  return href ? { node: link(href, address), end: at + address.length } : null;
}

const isWord = (character) => character !== undefined && /[\p{L}\p{N}]/u.test(character);

function emphasisAt(text, at, missing, depth, isLink) {
  for (const [mark, tag] of PAIRS) {
    if (!text.startsWith(mark, at) || missing.has(mark)) continue;
    const inner = at + mark.length;
    if (/\s|^$/.test(text[inner] ?? "") || (mark[0] === "_" && isWord(text[at - 1]))) continue;
    const end = closingOf(text, inner, mark);
    if (end === -1) {
      missing.add(mark);
      continue;
    }
    const children = renderInline(text.slice(inner, end), depth + 1, isLink);
    const node = el(tag, {}, ...children);
    return { node: mark === "***" ? el("em", {}, node) : node, end: end + mark.length };
  }
  return null;
}

function closingOf(text, from, mark) {
  let end = text.indexOf(mark, from + 1);
  while (end !== -1) {
    // A run that is longer than the mark ends an inner mark first: "*a **b***".
    let run = mark.length;
    while (text[end + run] === mark[0]) run += 1;
    const isInner = mark.length === 1 && run === 2;
    const isSpaced = /\s/.test(text[end - 1]) || text[end - 1] === "\\";
    const isInWord = mark[0] === "_" && isWord(text[end + run]);
    if (!isInner && !isSpaced && !isInWord) return end + run - mark.length;
    end = text.indexOf(mark, end + run);
  }
  return -1;
}

function renderCode(block) {
  const code = el("code", { text: block.text });
  const label = block.language ? t("Copy {language} code", { language: block.language }) : t("Copy code");
  const bar = el("div", { class: "code-bar" }, el("span", { text: block.language || t("text") }), copyButton(label, () => code.textContent));
  return el("div", { class: "code", dir: "ltr" }, bar, el("pre", { tabindex: "0" }, code));
}

function renderList(block) {
  const items = block.items.map((blocks) =>
    el("li", { dir: "auto" }, ...blocks.flatMap((inner) =>
      inner.type === "paragraph" && !block.loose ? renderInline(inner.text) : [renderBlock(inner)])));
  return el(block.ordered ? "ol" : "ul", { start: block.start === 1 ? null : String(block.start) }, ...items);
}

function renderTable(block) {
  const row = (cells, tag) =>
    el("tr", {}, ...block.align.map((align, at) => el(tag, { dir: "auto", class: align }, ...renderInline(cells[at] ?? ""))));
  return el("div", { class: "table", tabindex: "0", role: "region", "aria-label": t("Table") },
    el("table", {}, el("thead", {}, row(block.head, "th")), el("tbody", {}, ...block.rows.map((cells) => row(cells, "td")))));
}

export function renderBlock(block) {
  switch (block.type) {
    case "code":
      return renderCode(block);
    case "heading":
      // The page has its own h1 and h2.
      return el(`h${Math.min(block.level + 2, 6)}`, { dir: "auto", class: `level-${block.level}` }, ...renderInline(block.text));
    case "rule":
      return el("hr");
    case "quote":
      return el("blockquote", { dir: "auto" }, ...block.blocks.map(renderBlock));
    case "list":
      return renderList(block);
    case "table":
      return renderTable(block);
    default:
      return el("p", { dir: "auto" }, ...renderInline(block.text));
  }
}

// A place that shows a growing text: blocks that did not change keep their elements, with selection and focus in them.
export class MarkdownView {
  constructor(place) {
    this.place = place;
    this.drawn = [];
  }

  update(text) {
    const blocks = parseBlocks(text);
    let same = 0;
    while (same < blocks.length && this.drawn[same]?.source === blocks[same].source) same += 1;
    const [old, fresh] = [this.drawn[same], blocks[same]];
    if (old?.type === "code" && fresh?.type === "code" && old.language === fresh.language) {
      this.place.children[same].querySelector("code").textContent = fresh.text;
      same += 1;
    }
    while (this.place.children.length > same) this.place.lastChild.remove();
    this.place.append(...blocks.slice(same).map(renderBlock));
    this.drawn = blocks;
  }
}
