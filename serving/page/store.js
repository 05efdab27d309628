// What stays in this browser: conversations, one entry each, and the settings. Nothing of it is sent to the server
// except the conversation that is being answered.

import { t } from "./language.js";

const PREFIX = "qwen-chat:";
const CONVERSATION = `${PREFIX}conversation:`;

export class StorageFull extends Error {}

export function newId() {
  return Array.from(crypto.getRandomValues(new Uint32Array(3)), (part) => part.toString(36)).join("");
}

export function newConversation(system = "") {
  return { id: newId(), revision: 0, title: "", updated: Date.now(), system, messages: [] };
}

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch (error) {
    throw new StorageFull(
      error.name === "QuotaExceededError"
        ? t("The browser's storage is full, so this conversation is not kept. Export and delete old ones.")
        : t("This browser does not let the page store anything, so conversations are gone when it is closed."),
    );
  }
}

const isConversation = (value) => typeof value?.id === "string" && Array.isArray(value.messages);

export function readConversation(id) {
  const conversation = read(CONVERSATION + id);
  return isConversation(conversation) ? conversation : null;
}

// Newest first.
export function listConversations() {
  const found = [];
  try {
    for (let at = 0; at < localStorage.length; at += 1) {
      const key = localStorage.key(at);
      const conversation = key.startsWith(CONVERSATION) ? read(key) : null;
      if (isConversation(conversation)) found.push(conversation);
    }
  } catch {
    return [];
  }
  return found.sort((one, other) => other.updated - one.updated);
}

// Whether it was kept, and is not any more: another tab has deleted it.
export function isDeleted({ id, revision }) {
  try {
    return revision > 0 && localStorage.getItem(CONVERSATION + id) === null;
  } catch {
    return false;
  }
}

// Another tab may have written the same conversation since this one read it; then this one is kept as a copy beside it.
// What was deleted stays deleted.
export function saveConversation(conversation) {
  if (isDeleted(conversation)) return;
  const stored = readConversation(conversation.id);
  const isOther = stored && stored.revision !== conversation.revision;
  const copy = isOther ? { id: newId(), title: t("{title} (this tab)", { title: conversation.title }) } : {};
  const kept = { ...conversation, ...copy, revision: conversation.revision + 1, updated: Date.now() };
  write(CONVERSATION + kept.id, kept);
  Object.assign(conversation, kept);
}

// Returns the conversation as it was kept, for restoreConversation.
export function deleteConversation(id) {
  const conversation = readConversation(id);
  localStorage.removeItem(CONVERSATION + id);
  return conversation;
}

export function restoreConversation(conversation) {
  write(CONVERSATION + conversation.id, conversation);
}

// Calls back with the id of a conversation that another tab has changed.
export function onOtherTab(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(CONVERSATION)) changed((event.key ?? "").slice(CONVERSATION.length));
  });
}

export function readSettings() {
  const settings = read(`${PREFIX}settings`);
  return { model: "", system: "", thinking: "", reasoning_effort: "", tools: "", sampling: {}, ...(settings ?? {}) };
}

// Changes the settings of this tab, and those that are kept, in which another tab may have changed others.
export function changeSettings(settings, change) {
  change(settings);
  const kept = readSettings();
  change(kept);
  write(`${PREFIX}settings`, kept);
}

export function saveTheme(theme) {
  try {
    localStorage.setItem(`${PREFIX}theme`, theme);
  } catch {
    // It holds until the page is closed.
  }
}

// The key stays in this tab, or in this browser where that is wanted.
export function readKey() {
  try {
    return sessionStorage.getItem(`${PREFIX}key`) ?? localStorage.getItem(`${PREFIX}key`) ?? "";
  } catch {
    return "";
  }
}

export function saveKey(key, remember) {
  try {
    localStorage.removeItem(`${PREFIX}key`);
    sessionStorage.removeItem(`${PREFIX}key`);
    if (key) (remember ? localStorage : sessionStorage).setItem(`${PREFIX}key`, key);
  } catch {
    // It holds until the page is closed.
  }
}

const isJson = (text) => {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
};

// Answers without any content are left out, and so are calls that the conversation went on without: both the API and
// training data want a result for each call.
function writtenMessages({ system, messages }, withThinking = true) {
  const written = system.trim() ? [{ role: "system", content: system }] : [];
  messages.forEach(({ role, content, calls = [], thinking, tool_call_id }, at) => {
    const next = messages[at + 1];
    const kept = next ? next.role === "tool" : calls.every((call) => isJson(call.arguments)); // the last one may be half a call
    const tool_calls = (kept ? calls : []).map(({ id, name, arguments: text }) => ({
      id, type: "function", function: { name, arguments: text },
    }));
    if (role === "tool") written.push({ role, tool_call_id, content });
    else if (role === "user") written.push({ role, content });
    else if (content || tool_calls.length) {
      written.push({
        role, content,
        ...(thinking && withThinking ? { reasoning_content: thinking } : {}),
        ...(tool_calls.length ? { tool_calls } : {}),
      });
    }
  });
  return written;
}

// The messages of a conversation as the API takes them. Which thinking the model reads again is its chat format's affair;
// one that knows no thinking refuses it.
export function requestMessages(conversation, withThinking) {
  return writtenMessages(conversation, withThinking);
}

// Functions that were offered, with those of another request: the last description of each name.
export function joinTools(earlier, tools) {
  return [...new Map([...earlier, ...tools].map((tool) => [tool?.function?.name, tool])).values()];
}

const hasNull = (value) => value === null || (typeof value === "object" && Object.values(value).some(hasNull));

// One conversation per line, in the format "messages", which the toolkit reads as training data. Those without an answer
// have nothing to train. A list that has null in it is written as text, as tables lose such fields.
export function exportLines(conversations) {
  return conversations
    .map((conversation) => {
      const messages = writtenMessages(conversation);
      if (!messages.some(({ role }) => role === "assistant")) return "";
      for (const { function: call } of messages.flatMap((message) => message.tool_calls ?? [])) {
        if (call.arguments && !isJson(call.arguments)) call.arguments = JSON.stringify(call.arguments);
      }
      const tools = conversation.tools ?? [];
      const offered = tools.length ? { tools: hasNull(tools) ? JSON.stringify(tools) : tools } : {};
      return `${JSON.stringify({ messages, ...offered })}\n`;
    })
    .join("");
}
