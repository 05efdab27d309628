// The page: one conversation, the list of the others, and what the keys and buttons do.
import { listModels } from "./api.js";
import { Answering } from "./answering.js";
import { announce, byId, el } from "./dom.js";
import { History, titleOf } from "./history.js";
import { t, translatePage } from "./language.js";
import { AnswerView, QuestionView } from "./message.js";
import { closeCoveringPanel, connectKey, connectPanels, connectTheme, showBanner, showToast } from "./panels.js";
import { connectSettings, requestSettings } from "./settings.js";
import * as store from "./store.js";

const LONGEST_TITLE = 60;
const LONGEST_SPOKEN = 600;

const settings = store.readSettings();
let key = store.readKey();
let conversation = null;
let views = [];
let answering = null;
let areModelsKnown = false;
let hasThinking = false; // of the models, which share a chat format
let isKept = true; // false: the storage had no room for the conversation

const prompt = byId("prompt");
const history = new History(
  { open: openConversation, close: closeConversation, freed: () => isKept || save(), failed: showBanner },
  () => conversation.id,
);
const askForKey = connectKey((given) => {
  key = given;
  showBanner("");
  loadModels();
});

// ------------------------------------------------------------------------------------------------ conversations

function openConversation(id) {
  stop();
  conversation = store.readConversation(id) ?? store.newConversation(settings.system);
  for (const message of conversation.messages) {
    if (message.role === "assistant" && !message.finish && !message.error) message.finish = "interrupted";
  }
  drawConversation();
  closeCoveringPanel();
  if (matchMedia("(pointer: fine)").matches) prompt.focus();
}

function closeConversation(id) {
  if (id === conversation.id) openConversation("");
}

function drawConversation() {
  byId("system").value = conversation.system;
  byId("messages").replaceChildren();
  views = [];
  conversation.messages.forEach(addView);
  drawAround();
  byId("scroll").scrollTop = byId("scroll").scrollHeight;
}

function addView(message) {
  const view = message.role === "assistant" ? new AnswerView(message, actions) : new QuestionView(message, actions);
  views.push(view);
  byId("messages").append(view.element);
}

// What depends on the conversation as a whole: title, buttons, the last answer, the list.
function drawAround() {
  byId("title").textContent = titleOf(conversation);
  document.title = titleOf(conversation);
  byId("empty").hidden = views.length > 0;
  byId("send").hidden = Boolean(answering);
  byId("stop").hidden = !answering;
  byId("send").disabled = !prompt.value.trim();
  views.forEach((view, at) => {
    if (view instanceof AnswerView) view.update(view.message === answering?.message, at === views.length - 1);
  });
  history.draw();
}

function save() {
  try {
    if (conversation.messages.length) store.saveConversation(conversation);
    if (!isKept) showBanner("");
    isKept = true;
  } catch (error) {
    isKept = false;
    showBanner(error.message);
  }
}

function changeSettings(change) {
  try {
    store.changeSettings(settings, change);
  } catch (error) {
    showBanner(error.message);
  }
}

// Removes a message and everything after it.
function cutFrom(message) {
  const at = conversation.messages.indexOf(message);
  conversation.messages.length = at;
  for (const view of views.splice(at)) view.element.remove();
}

// ------------------------------------------------------------------------------------------------------ answers

const actions = {
  regenerate(message) {
    if (answering) return;
    cutFrom(message);
    answer();
  },
  resend(message, text) {
    stop();
    cutFrom(message);
    ask(text);
  },
  sendResults(message, results) {
    if (answering) return;
    results.forEach((content, at) => {
      const { id, name } = message.calls[at];
      add({ role: "tool", tool_call_id: id, name, content });
    });
    answer();
  },
};

function add(message) {
  conversation.messages.push(message);
  addView(message);
}

function ask(text) {
  if (!conversation.title) {
    const line = text.trim().split("\n")[0];
    conversation.title = line.length > LONGEST_TITLE ? `${[...line].slice(0, LONGEST_TITLE).join("")}…` : line;
  }
  add({ role: "user", content: text });
  answer();
}

async function answer() {
  const own = conversation;
  if (!areModelsKnown) await loadModels(); // the server was not there when the page was opened, or is another one
  if (conversation !== own || answering) return;
  const request = { model: byId("model").value, messages: store.requestMessages(conversation, hasThinking), ...requestSettings(settings) };
  const message = { role: "assistant", content: "", thinking: "", calls: [], model: request.model };
  add(message);
  const view = views.at(-1);
  const begin = () => (own.tools = store.joinTools(own.tools ?? [], request.tools ?? [])); // the server accepts them
  const draw = () => following(() => view.update(true));
  const current = new Answering(message, request, key, { begin, draw, save });
  answering = current;
  showBanner("");
  save();
  drawAround();
  scrollToEnd();
  announce(t("Answering"));
  const fault = await current.done;
  if (fault?.kind === "network" || fault?.kind === "model") areModelsKnown = false;
  // Another answer has begun, or another conversation is open; stop() has saved this one.
  if (conversation !== own || (answering && answering !== current)) return;
  answering = null;
  save();
  following(drawAround);
  announce(message.error ?? t("Answer complete. {start}", { start: message.content.slice(0, LONGEST_SPOKEN) }));
  if (fault?.kind === "key") askForKey(fault.message);
}

function stop() {
  if (!answering) return;
  answering.stop();
  answering.message.finish = "stopped";
  answering = null;
  save();
  drawAround();
}

// ---------------------------------------------------------------------------------------------------- scrolling

const isAtEnd = () => byId("scroll").scrollHeight - byId("scroll").scrollTop - byId("scroll").clientHeight < 60;

function scrollToEnd() {
  byId("scroll").scrollTop = byId("scroll").scrollHeight;
  byId("latest").hidden = true;
}

// Draws, and stays at the end if the reader was there.
function following(draw) {
  const wasAtEnd = isAtEnd();
  draw();
  if (wasAtEnd) scrollToEnd();
  else byId("latest").hidden = false;
}

// --------------------------------------------------------------------------------------------------- the server

async function loadModels() {
  let models;
  try {
    models = await listModels(key);
  } catch (error) {
    if (error.kind === "key") askForKey(error.message);
    showBanner(error.message, { label: t("Retry"), run: loadModels });
    return;
  }
  showBanner("");
  areModelsKnown = models.length > 0;
  hasThinking = models.some((model) => model.hasThinking);
  const select = byId("model");
  select.replaceChildren(...models.map(({ id }) => el("option", { value: id, text: id })));
  if (models.some(({ id }) => id === settings.model)) select.value = settings.model;
  select.hidden = models.length === 0;
}

// --------------------------------------------------------------------------------------------------------- keys

function send() {
  if (answering || !prompt.value.trim()) return;
  const text = prompt.value;
  prompt.value = "";
  fitPrompt();
  ask(text);
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  byId("send").disabled = !prompt.value.trim();
}

function keydown(event) {
  // While an input method composes, Enter picks a character.
  if (event.isComposing || event.keyCode === 229) return;
  if (event.key === "Escape" && !document.querySelector("dialog[open]") && !closeCoveringPanel()) {
    stop();
  } else if (event.target === prompt && event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send();
  } else if (event.target === prompt && event.key === "ArrowUp" && !prompt.value) {
    const last = views.findLast((view) => view.message.role === "user");
    if (last) event.preventDefault();
    last?.edit();
  }
}

function connect() {
  translatePage();
  connectTheme();
  connectPanels();
  connectSettings(settings, changeSettings);
  byId("system").addEventListener("input", ({ target }) => {
    conversation.system = target.value;
    changeSettings((each) => (each.system = target.value));
    if (!answering) save();
  });
  byId("model").addEventListener("change", ({ target }) => {
    changeSettings((each) => (each.model = target.value));
  });
  byId("new").addEventListener("click", () => {
    openConversation("");
    prompt.focus();
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => {
    stop();
    prompt.focus();
  });
  byId("latest").addEventListener("click", scrollToEnd);
  byId("scroll").addEventListener("scroll", () => isAtEnd() && (byId("latest").hidden = true));
  prompt.addEventListener("input", fitPrompt);
  addEventListener("keydown", keydown);
  addEventListener("pagehide", () => answering?.leave());
  addEventListener("pageshow", (event) => event.persisted && openConversation(conversation.id));
  store.onOtherTab((id) => {
    if (store.isDeleted(conversation)) {
      openConversation("");
      showToast(t("The conversation was deleted in another tab."));
    } else if (id === conversation.id && !answering) {
      openChanged(id);
    }
    history.draw();
  });
}

// Another tab went on with this conversation.
function openChanged(id) {
  const changed = store.readConversation(id);
  if (!changed || byId("messages").querySelector("form")) return;
  conversation = changed;
  drawConversation();
}

connect();
openConversation(store.listConversations()[0]?.id ?? "");
loadModels();
