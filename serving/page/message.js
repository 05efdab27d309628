// One message of a conversation on the page. `update` draws what has changed since.
import { copyButton, el, icon, iconButton } from "./dom.js";
import { t } from "./language.js";
import { MarkdownView } from "./markdown.js";

const FINISHED = {
  length: t("The answer reached its limit of tokens. “Longest answer” in the settings raises it."),
  stopped: t("Stopped."),
  interrupted: t("The page was closed before the answer was complete."),
  timeout: t("The server's limit of time for an answer ended it. Its flag --request_timeout raises it; a shorter answer takes less."),
  content_filter: t("The server withheld the rest."),
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
    this.thinking = fold(t("Thinking"), "thinking");
    this.text = el("div", { class: "text" });
    this.markdown = new MarkdownView(this.text);
    this.calls = el("div", { class: "calls" });
    this.notice = el("div", { class: "notice" });
    this.footer = el("footer", {});
    this.element = el("article", { class: "message answer", "aria-label": t("Answer") },
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
    const seconds = (message.thinkingTime / 1000).toFixed(1);
    const thought = message.thinkingTime > 100 ? t("Thought for {seconds} s", { seconds }) : t("Thought");
    thinking.title.textContent = isThinking ? t("Thinking…") : thought;
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
      details.querySelector(".call-name").textContent = t("Calls {name}", { name: calls[at].name || "…" });
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
      const field = el("textarea", { rows: "2", id: `result-${call.id}-${at}`, placeholder: t("What the call returned"), dir: "auto" });
      return el("div", { class: "field" }, el("label", { for: field.id, text: t("Result of {name}", { name: call.name }) }), field);
    });
    const submit = (event) => {
      event.preventDefault();
      this.actions.sendResults(this.message, Array.from(event.target.querySelectorAll("textarea"), (field) => field.value));
    };
    return el("form", { class: "results", submit }, ...fields, el("button", { class: "primary", text: t("Send results") }));
  }

  #drawNotice(isRunning, isLast) {
    const { message, notice } = this;
    const text = isRunning ? "" : (message.error ?? FINISHED[message.finish] ?? "");
    notice.hidden = !text;
    notice.classList.toggle("error", Boolean(message.error));
    if (!text) return;
    const retry = message.error && isLast
      ? [el("button", { type: "button", class: "secondary", text: t("Retry"), click: () => this.actions.regenerate(message) })]
      : [];
    notice.replaceChildren(el("span", { text, dir: "auto" }), ...retry);
  }

  #footerParts(isLast) {
    const { message } = this;
    const parts = [];
    if (message.content) parts.push(copyButton(t("Copy answer"), () => message.content));
    if (isLast && !message.error) parts.push(iconButton("retry", t("Answer again"), () => this.actions.regenerate(message)));
    const figures = [message.model];
    const tokens = message.usage?.completion_tokens;
    if (tokens) figures.push(tokens === 1 ? t("1 token") : t("{tokens} tokens", { tokens }));
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
      class: `message ${isResult ? "result" : "question"}`, "aria-label": isResult ? t("Result of a call") : t("You"),
    });
    this.update();
  }

  update() {
    const { message } = this;
    const text = el("div", { class: "bubble", text: message.content, dir: "auto" });
    if (message.role === "tool") {
      this.element.replaceChildren(el("div", { class: "result-name", text: message.name ? t("Result of {name}", { name: message.name }) : t("Result of a call") }), text);
      return;
    }
    const footer = el("footer", {}, copyButton(t("Copy message"), () => message.content), iconButton("edit", t("Edit and send again"), () => this.edit()));
    this.element.replaceChildren(text, footer);
  }

  edit() {
    const field = el("textarea", { "aria-label": t("Edit message"), dir: "auto", rows: String(Math.min(12, this.message.content.split("\n").length + 1)) });
    field.value = this.message.content;
    const close = () => {
      this.update();
      this.element.querySelector("footer button:last-child").focus();
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
      el("p", { class: "hint", text: t("What follows this message is replaced.") }),
      el("div", { class: "row" },
        el("button", { type: "button", class: "secondary", text: t("Cancel"), click: close }),
        el("button", { class: "primary", text: t("Send") }))));
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}
