// The blocks of a Markdown text: paragraphs, headings, lists, quotes, tables, code. Each pass looks at a line once.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const DEEPEST = 8; // lists and quotes nested deeper are text

const LONGEST_RULE = 1000; // of a table: the pattern above takes quadratic time

const isBlank = (line) => line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;

// Blocks: {type, source, ...}. Equal source means equal block, so what is drawn already can stay.
export function parseBlocks(text, depth = 0) {
  const lines = text.split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, next] = blockAt(lines, at, depth);
    block.source = lines.slice(at, next).join("\n");
    blocks.push(block);
    at = next;
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return codeAt(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [{ type: "heading", level: heading[1].length, text: withoutClosing(heading[2]) }, at + 1];
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (QUOTE.test(line) && depth < DEEPEST) return quoteAt(lines, at, depth);
  if (ITEM.test(line) && depth < DEEPEST) return listAt(lines, at, depth);
  if (isTableAt(lines, at)) return tableAt(lines, at);
  return paragraphAt(lines, at, depth);
}

function withoutClosing(title) {
  let end = title.trimEnd().length;
  while (title[end - 1] === "#") end -= 1;
  return end === 0 || /\s/.test(title[end - 1]) ? title.slice(0, end).trimEnd() : title.trimEnd();
}

function codeAt(lines, at, [opening, marks, language]) {
  const indent = indentOf(opening);
  const closing = new RegExp(`^ {0,3}${marks[0]}{${marks.length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const body = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line))));
  return [{ type: "code", language: language.trim().split(/\s/)[0], text: body.join("\n") }, Math.min(end + 1, lines.length)];
}

function quoteAt(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [{ type: "quote", blocks: parseBlocks(inner.join("\n"), depth + 1) }, end];
}

function listAt(lines, at, depth) {
  const [, , first] = ITEM.exec(lines[at]);
  const kind = (marker) => (/\d/.test(marker) ? marker.at(-1) : marker);
  const items = [];
  let loose = false;
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || kind(item[2]) !== kind(first) || RULE.test(lines[end])) break;
    const [next, body] = itemAt(lines, end, item);
    items.push(parseBlocks(body.join("\n"), depth + 1));
    end = next;
    let following = end;
    while (following < lines.length && isBlank(lines[following])) following += 1;
    const another = following < lines.length && ITEM.exec(lines[following]);
    if (following > end && another && kind(another[2]) === kind(first)) {
      loose = true;
      end = following;
    }
  }
  const ordered = /\d/.test(first);
  return [{ type: "list", ordered, start: ordered ? Number.parseInt(first, 10) : 1, loose, items }, end];
}

// An item goes on over lines that are indented as far as its text, and over unindented lines of its last paragraph.
function itemAt(lines, at, [marker, indent, , gap]) {
  const width = marker.length - (gap.length > 4 ? gap.length - 1 : 0);
  const body = [lines[at].slice(width)];
  let end = at + 1;
  while (end < lines.length) {
    const line = lines[end];
    if (isBlank(line)) {
      let next = end + 1;
      while (next < lines.length && isBlank(lines[next])) next += 1;
      if (next === lines.length || indentOf(lines[next]) < Math.min(width, indent.length + 2)) break;
      body.push(...lines.slice(end, next).map(() => ""));
      end = next;
    } else if (indentOf(line) > indent.length) {
      body.push(line.slice(Math.min(width, indentOf(line))));
      end += 1;
    } else if (startsBlock(line) || isBlank(lines[end - 1])) {
      break;
    } else {
      body.push(line);
      end += 1;
    }
  }
  return [end, body];
}

const startsBlock = (line) =>
  FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

function cellsOf(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

const isTableAt = (lines, at) =>
  lines[at].includes("|") &&
  at + 1 < lines.length &&
  lines[at + 1].length <= LONGEST_RULE &&
  TABLE_RULE.test(lines[at + 1]) &&
  cellsOf(lines[at]).length === cellsOf(lines[at + 1]).length;

function tableAt(lines, at) {
  const align = cellsOf(lines[at + 1]).map((rule) => {
    if (rule.endsWith(":")) return rule.startsWith(":") ? "center" : "end";
    return "start";
  });
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const rows = lines.slice(at + 2, end).map((line) => cellsOf(line).slice(0, align.length));
  return [{ type: "table", align, head: cellsOf(lines[at]), rows }, end];
}

function paragraphAt(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end])) {
    if (startsBlock(lines[end]) && (depth < DEEPEST || !(QUOTE.test(lines[end]) || ITEM.test(lines[end])))) break;
    if (isTableAt(lines, end)) break;
    end += 1;
  }
  return [{ type: "paragraph", text: lines.slice(at, end).join("\n") }, end];
}
