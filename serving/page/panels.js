// Side panels, dialogs, colours, and the short note with "Undo".
import { byId, el } from "./dom.js";
import { t } from "./language.js";
import { readKey, saveKey, saveTheme } from "./store.js";

const NARROW = matchMedia("(max-width: 60rem)");
const PANELS = ["history", "settings"];

const opener = (name) => document.querySelector(`[data-opens=${name}]`);
const isOpen = (name) => document.body.classList.contains(`with-${name}`);

export function showPanel(name, open, focus = true) {
  if (open && NARROW.matches) PANELS.filter((other) => other !== name).forEach((other) => showPanel(other, false, false));
  document.body.classList.toggle(`with-${name}`, open);
  byId(name).inert = !open;
  opener(name).setAttribute("aria-expanded", String(open));
  const covered = NARROW.matches && PANELS.some(isOpen);
  byId("page").inert = covered;
  byId("shade").hidden = !covered;
  if (focus) (open ? byId(name).querySelector("button, textarea") : opener(name)).focus();
}

// Panels cover the page where it is narrow. Returns whether one was closed.
export function closeCoveringPanel() {
  const open = NARROW.matches && PANELS.find(isOpen);
  if (open) showPanel(open, false);
  return Boolean(open);
}

export function connectPanels() {
  for (const name of PANELS) {
    opener(name).addEventListener("click", () => showPanel(name, !isOpen(name)));
    document.querySelector(`[data-closes=${name}]`).addEventListener("click", () => showPanel(name, false));
  }
  byId("shade").addEventListener("click", closeCoveringPanel);
  const arrange = () => {
    showPanel("settings", false, false);
    showPanel("history", !NARROW.matches, false);
  };
  NARROW.addEventListener("change", arrange);
  arrange();
}

export function connectTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const show = () => byId("theme").setAttribute("aria-pressed", String(isDark()));
  byId("theme").addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    saveTheme(theme);
    show();
  });
  system.addEventListener("change", show);
  show();
}

// Calls done(key) with a new key. `reason` says why one is asked for.
export function connectKey(done) {
  const dialog = byId("key-dialog");
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = byId("key").value.trim();
    saveKey(key, byId("remember-key").checked);
    dialog.close();
    done(key);
  });
  byId("cancel-key").addEventListener("click", () => dialog.close());
  const ask = (reason) => {
    byId("key-reason").textContent = reason;
    byId("key").value = readKey();
    if (!dialog.open) dialog.showModal();
    byId("key").select();
  };
  byId("change-key").addEventListener("click", () => ask(t("It is sent to this server only.")));
  return ask;
}

export function confirmDeletion(text) {
  const dialog = byId("confirm");
  byId("confirm-text").textContent = text;
  dialog.showModal();
  byId("confirm-no").focus();
  return new Promise((resolve) => {
    const answer = (value) => () => {
      dialog.close();
      resolve(value);
    };
    byId("confirm-yes").onclick = answer(true);
    byId("confirm-no").onclick = answer(false);
    dialog.oncancel = answer(false); // Esc
  });
}

let toastEnd = 0;

export function showToast(text, action = null, seconds = 8) {
  const toast = byId("toast");
  const hide = () => (toast.hidden = true);
  const click = () => {
    hide();
    action.run();
  };
  toast.replaceChildren(el("span", { text }), ...(action ? [el("button", { type: "button", text: action.label, click })] : []));
  toast.hidden = false;
  clearTimeout(toastEnd);
  toastEnd = setTimeout(hide, seconds * 1000);
}

export function showBanner(text, action = null) {
  const banner = byId("banner");
  banner.hidden = !text;
  const button = action && el("button", { type: "button", class: "secondary", text: action.label, click: action.run });
  banner.replaceChildren(...(text ? [el("span", { text, dir: "auto" }), ...(button ? [button] : [])] : []));
}
