// What stays in this browser: conversations, one entry each, and the settings. Nothing of it is sent to the server
// except the conversation that is being answered.

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
        ? "The browser's storage is full, so this conversation is not kept. Export and delete old ones."
        : "This browser does not let the page store anything, so conversations are gone when it is closed.",
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

// Another tab may have written the same conversation since this one read it; then this one is kept as a copy beside it.
export function saveConversation(conversation) {
  const stored = readConversation(conversation.id);
  if (stored && stored.revision !== conversation.revision) {
    conversation.id = newId();
    conversation.title = `${conversation.title} (this tab)`;
  }
  conversation.revision += 1;
  conversation.updated = Date.now();
  write(CONVERSATION + conversation.id, conversation);
}

export function deleteConversation(id) {
  localStorage.removeItem(CONVERSATION + id);
}

// Calls back with the id of a conversation that another tab has changed.
export function onOtherTab(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(CONVERSATION)) changed((event.key ?? "").slice(CONVERSATION.length));
  });
}

export function readSettings() {
  const settings = read(`${PREFIX}settings`);
  return { model: "", system: "", thinking: "", tools: "", sampling: {}, ...(settings ?? {}) };
}

export function saveSettings(settings) {
  write(`${PREFIX}settings`, settings);
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

// The messages of a conversation as the API takes them. Answers without any content are left out.
export function requestMessages(conversation) {
  const messages = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  for (const message of conversation.messages) {
    if (message.role === "tool") {
      messages.push({ role: "tool", tool_call_id: message.tool_call_id, content: message.content });
    } else if (message.role === "user") {
      messages.push({ role: "user", content: message.content });
    } else if (message.content || message.calls?.length) {
      messages.push({ role: "assistant", content: message.content, ...callsOf(message) });
    }
  }
  return messages;
}

function callsOf(message) {
  if (!message.calls?.length) return {};
  return {
    tool_calls: message.calls.map(({ id, name, arguments: text }) => ({
      id, type: "function", function: { name, arguments: text },
    })),
  };
}

// One conversation per line, in the format "messages", which the toolkit reads as training data.
export function exportLines(conversations) {
  return conversations
    .map((conversation) => {
      const messages = requestMessages(conversation);
      const answers = conversation.messages.filter((message) => message.role === "assistant" && (message.content || message.calls?.length));
      const written = messages.filter((message) => message.role === "assistant");
      written.forEach((message, at) => {
        if (answers[at].thinking) message.reasoning_content = answers[at].thinking;
      });
      return messages.length ? `${JSON.stringify({ messages })}\n` : "";
    })
    .join("");
}
