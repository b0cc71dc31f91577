// Runs before textual.js, which reads the attributes of #terminal when the page is loaded.
"use strict";

// The monitor needs 40 columns, and the tabs of a peer 50. A character is 0.6 times as wide as high.
const MIN_COLUMNS = 50;
const MIN_FONT_PX = 8;
const MAX_FONT_PX = 15;
const fitting = Math.floor(window.innerWidth / (MIN_COLUMNS * 0.6));

const terminal = document.getElementById("terminal");
terminal.dataset.fontSize = Math.max(MIN_FONT_PX, Math.min(MAX_FONT_PX, fitting));
terminal.dataset.sessionWebsocketUrl = `ws://${location.host}/ws`;

// textual.js sets these classes when the connection opens and closes.
const again = document.getElementById("again");
again.addEventListener("click", () => location.assign("/"));
function focusKeys() {
  const { classList } = document.body;
  const keys = classList.contains("-loaded") && terminal.querySelector("textarea");
  (classList.contains("-closed") ? again : keys)?.focus?.();
}
new MutationObserver(focusKeys).observe(document.body, { attributeFilter: ["class"] });
window.addEventListener("focus", focusKeys);

// The text of peers can look like a link. Only downloads from this server open.
const openWindow = window.open.bind(window);
window.open = (url, target) =>
  url && new URL(url, location.href).origin === location.origin ? openWindow(url, target) : null;
