// Runs before the first paint, so that a dark page never flashes white. "auto" follows the system.
"use strict";
try {
  const theme = localStorage.getItem("qwen-chat:theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is switched off: the system's choice holds.
}
