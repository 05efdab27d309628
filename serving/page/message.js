// One message of a conversation on the page. `update` draws what has changed since.
import { copyButton, el, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const FINISHED = {
  length: "The answer reached its limit of tokens. “Longest answer” in the settings raises it.",
  stopped: "Stopped.",
  interrupted: "The page was closed before the answer was complete.",
  timeout: "The server's limit of time for an answer ended it. Its flag --request_timeout raises it; a shorter answer takes less.",
  content_filter: "The server withheld the rest.",
};

function fold(label, kind) {
  const title = el("span", { text: label });
  const body = el("div", { class: "fold-body", dir: "auto" });
  const details = el("details", { class: `fold ${kind}` }, el("summary", {}, icon("chevron"), title), body);
  return { details, title, body };
}

function readable(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

export class AnswerView {
  // actions: {regenerate(message), sendResults(message, results)}
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.thinking = fold("Thinking", "thinking");
    this.text = el("div", { class: "text" });
    this.markdown = new MarkdownView(this.text);
    this.calls = el("div", { class: "calls" });
    this.notice = el("div", { class: "notice" });
    this.footer = el("footer", {});
    this.element = el("article", { class: "message answer", "aria-label": "Answer" },
      this.thinking.details, this.text, this.calls, this.notice, this.footer);
    this.update();
  }

  update(isRunning = false, isLast = false) {
    const { message } = this;
    this.element.setAttribute("aria-busy", String(isRunning));
    this.element.classList.toggle("waiting", isRunning && !message.content && !message.thinking && !message.calls?.length);
    this.#drawThinking(isRunning);
    this.markdown.update(message.content);
    this.#drawCalls(isRunning, isLast);
    this.#drawNotice(isRunning, isLast);
    this.footer.replaceChildren(...(isRunning ? [] : this.#footerParts(isLast)));
  }

  #drawThinking(isRunning) {
    const { message, thinking } = this;
    thinking.details.hidden = !message.thinking;
    if (!message.thinking) return;
    const isThinking = isRunning && !message.content && !message.calls?.length;
    const seconds = message.thinkingTime > 100 ? ` for ${(message.thinkingTime / 1000).toFixed(1)} s` : "";
    thinking.title.textContent = isThinking ? "Thinking…" : `Thought${seconds}`;
    if (thinking.body.textContent !== message.thinking) thinking.body.textContent = message.thinking;
  }

  #drawCalls(isRunning, isLast) {
    const { message } = this;
    const calls = message.calls ?? [];
    while (this.calls.querySelectorAll("details").length < calls.length) {
      const { details, title, body } = fold("", "call");
      details.open = true;
      title.className = "call-name";
      body.append(el("pre", { dir: "ltr", tabindex: "0" }));
      this.calls.append(details);
    }
    this.calls.querySelectorAll("details").forEach((details, at) => {
      details.querySelector(".call-name").textContent = `Calls ${calls[at].name || "…"}`;
      const body = details.querySelector("pre");
      const text = isRunning ? calls[at].arguments : readable(calls[at].arguments);
      if (body.textContent !== text) body.textContent = text;
    });
    const form = this.calls.querySelector("form");
    const wanted = calls.length > 0 && !isRunning && isLast && !message.error;
    if (wanted && !form) this.calls.append(this.#resultForm(calls));
    if (!wanted) form?.remove();
  }

  #resultForm(calls) {
    const fields = calls.map((call, at) => {
      const field = el("textarea", { rows: "2", id: `result-${call.id}-${at}`, placeholder: "What the call returned", dir: "auto" });
      return el("div", { class: "field" }, el("label", { for: field.id, text: `Result of ${call.name}` }), field);
    });
    const submit = (event) => {
      event.preventDefault();
      this.actions.sendResults(this.message, Array.from(event.target.querySelectorAll("textarea"), (field) => field.value));
    };
    return el("form", { class: "results", submit }, ...fields, el("button", { class: "primary", text: "Send results" }));
  }

  #drawNotice(isRunning, isLast) {
    const { message, notice } = this;
    const text = isRunning ? "" : (message.error ?? FINISHED[message.finish] ?? "");
    notice.hidden = !text;
    notice.classList.toggle("error", Boolean(message.error));
    if (!text) return;
    const retry = message.error && isLast
      ? [el("button", { type: "button", class: "secondary", text: "Retry", click: () => this.actions.regenerate(message) })]
      : [];
    notice.replaceChildren(el("span", { text, dir: "auto" }), ...retry);
  }

  #footerParts(isLast) {
    const { message } = this;
    const parts = [];
    if (message.content) parts.push(copyButton("Copy answer", () => message.content));
    if (isLast && !message.error) parts.push(iconButton("retry", "Answer again", () => this.actions.regenerate(message)));
    const figures = [message.model];
    const tokens = message.usage?.completion_tokens;
    if (tokens) figures.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
    if (tokens > 1 && message.time > 100) figures.push(`${((1000 * tokens) / message.time).toFixed(1)}/s`);
    return [...parts, el("span", { class: "figures", text: figures.filter(Boolean).join(" · ") })];
  }
}

export class QuestionView {
  // actions: {resend(message, text)}; also shows the results of calls, which cannot be edited.
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    const isResult = message.role === "tool";
    this.element = el("article", {
      class: `message ${isResult ? "result" : "question"}`, "aria-label": isResult ? "Result of a call" : "You",
    });
    this.update();
  }

  update() {
    const { message } = this;
    const text = el("div", { class: "bubble", text: message.content, dir: "auto" });
    if (message.role === "tool") {
      this.element.replaceChildren(el("div", { class: "result-name", text: `Result of ${message.name ?? "the call"}` }), text);
      return;
    }
    const footer = el("footer", {}, copyButton("Copy message", () => message.content), iconButton("edit", "Edit and send again", () => this.edit()));
    this.element.replaceChildren(text, footer);
  }

  edit() {
    const field = el("textarea", { "aria-label": "Edit message", dir: "auto", rows: String(Math.min(12, this.message.content.split("\n").length + 1)) });
    field.value = this.message.content;
    const close = () => {
      this.update();
      this.element.querySelector("button[aria-label^=Edit]").focus();
    };
    const submit = (event) => {
      event?.preventDefault();
      if (field.value.trim()) this.actions.resend(this.message, field.value);
    };
    const keydown = (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && !event.shiftKey) {
        submit(event);
      }
    };
    this.element.replaceChildren(el("form", { class: "edit", submit, keydown }, field,
      el("p", { class: "hint", text: "What follows this message is replaced." }),
      el("div", { class: "row" },
        el("button", { type: "button", class: "secondary", text: "Cancel", click: close }),
        el("button", { class: "primary", text: "Send" }))));
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}
