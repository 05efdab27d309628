// The list of earlier conversations.
import { byId, download, el, iconButton } from "./dom.js";
import { confirmDeletion, showToast } from "./panels.js";
import { deleteConversation, exportLines, listConversations, restoreConversation } from "./store.js";

export const titleOf = (conversation) => conversation.title || "New conversation";

function dayOf(time) {
  const days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(time).setHours(0, 0, 0, 0)) / 86400000);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  return days < 7 ? "This week" : "Earlier";
}

export class History {
  // actions: {open(id), close(id), freed(), failed(text)}; `current()` is the id of the open conversation.
  constructor(actions, current) {
    this.actions = actions;
    this.current = current;
    byId("export-all").addEventListener("click", () => this.#export(listConversations(), "conversations.jsonl"));
    byId("delete-all").addEventListener("click", () => this.#deleteAll());
    byId("conversations").addEventListener("keydown", (event) => this.#move(event));
  }

  draw() {
    const parts = [];
    let day = "";
    for (const conversation of listConversations()) {
      if (day !== dayOf(conversation.updated)) {
        day = dayOf(conversation.updated);
        parts.push(el("li", { class: "day", text: day }));
      }
      parts.push(this.#row(conversation));
    }
    byId("conversations").replaceChildren(...parts);
    for (const name of ["export-all", "delete-all"]) byId(name).disabled = parts.length === 0;
  }

  #row(conversation) {
    const title = titleOf(conversation);
    const isOpen = conversation.id === this.current();
    return el("li", { class: "entry" },
      el("button", {
        type: "button", class: "open", text: title, title, dir: "auto", "aria-current": isOpen ? "true" : null,
        click: () => this.actions.open(conversation.id),
      }),
      iconButton("save", `Export ${title}`, () => this.#export([conversation], "conversation.jsonl")),
      iconButton("trash", `Delete ${title}`, () => this.#delete(conversation.id)));
  }

  #export(conversations, name) {
    download(name, exportLines(conversations));
  }

  // Closed first: an answer that runs is kept when it is stopped.
  #delete(id) {
    this.actions.close(id);
    const conversation = deleteConversation(id);
    this.draw();
    (byId("conversations").querySelector("button") ?? byId("new")).focus();
    const run = () => {
      try {
        restoreConversation(conversation);
        this.draw();
      } catch (error) {
        this.actions.failed(error.message);
      }
    };
    showToast("Conversation deleted.", conversation && { label: "Undo", run });
    this.actions.freed();
  }

  async #deleteAll() {
    const all = listConversations();
    if (!(await confirmDeletion(`Delete ${all.length} conversation${all.length === 1 ? "" : "s"}? This cannot be undone.`))) return;
    for (const { id } of all) {
      this.actions.close(id);
      deleteConversation(id);
    }
    this.draw();
    this.actions.freed();
  }

  #move(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const buttons = [...byId("conversations").querySelectorAll(".open")];
    const at = buttons.indexOf(document.activeElement);
    if (!step || at === -1) return;
    event.preventDefault();
    buttons[Math.min(Math.max(at + step, 0), buttons.length - 1)].focus();
  }
}
