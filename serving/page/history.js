// The list of earlier conversations.
import { byId, download, el, iconButton } from "./dom.js";
import { t } from "./language.js";
import { confirmDeletion, showToast } from "./panels.js";
import { deleteConversation, exportLines, listConversations, restoreConversation } from "./store.js";

export const titleOf = (conversation) => conversation.title || t("New conversation");

function dayOf(time) {
  const days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(time).setHours(0, 0, 0, 0)) / 86400000);
  if (days <= 0) return t("Today");
  if (days === 1) return t("Yesterday");
  return days < 7 ? t("This week") : t("Earlier");
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
      iconButton("save", t("Export {title}", { title }), () => this.#export([conversation], "conversation.jsonl")),
      iconButton("trash", t("Delete {title}", { title }), () => this.#delete(conversation.id)));
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
    showToast(t("Conversation deleted."), conversation && { label: t("Undo"), run });
    this.actions.freed();
  }

  async #deleteAll() {
    const all = listConversations();
    const count = all.length;
    const one = t("Delete 1 conversation? This cannot be undone.");
    if (!(await confirmDeletion(count === 1 ? one : t("Delete {count} conversations? This cannot be undone.", { count })))) return;
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
