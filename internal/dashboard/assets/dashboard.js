// What the pages do beyond forms and links: copy, quick choices, live views. All of it works without, by hand.
"use strict";

// A form is sent once, however often its button is pressed.
for (const form of document.querySelectorAll("form[data-once]")) {
  form.addEventListener("submit", (event) => {
    if (form.dataset.sent) event.preventDefault();
    else if (!event.submitter?.name) form.dataset.sent = "yes";
  });
}

// Scopes are chosen without a round trip.
const chooses = { read: (name) => name.endsWith(":read"), all: () => true, none: () => false };
for (const button of document.querySelectorAll("button[name=choose]")) {
  button.addEventListener("click", (event) => {
    event.preventDefault();
    for (const box of document.querySelectorAll("input[name=scope]:enabled")) box.checked = chooses[button.value](box.value);
  });
}
document.querySelector("input[name=date]")?.addEventListener("input", () => {
  document.querySelector("input[name=expiry][value=date]").checked = true;
});

// Filters apply when they are chosen.
const filter = document.querySelector("form[data-filter]");
if (filter) {
  for (const select of filter.querySelectorAll("select")) select.addEventListener("change", () => filter.submit());
}

// A new key is copied on request, and leaves the page with the visitor: neither back nor a reload brings it again.
const secret = document.getElementById("secret");
if (secret) {
  const copy = document.getElementById("copy");
  const copied = document.getElementById("copied");
  history.replaceState(null, "", document.querySelector("[data-address]").dataset.address);
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(secret.value);
      copied.textContent = "Copied.";
    } catch {
      secret.select();
      copied.textContent = "Selected: press Ctrl+C, or ⌘C, to copy it.";
    }
  });
  secret.addEventListener("focus", () => secret.select());
  addEventListener("pagehide", () => secret.remove());
}
addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload();
});

// Live parts are taken from the page itself, read again. An XMLHttpRequest parses it without running anything. It keeps no
// session alive, and shows the sign-in form when the session has ended.
const partsOf = (doc) => doc.querySelectorAll("[data-part]");
const poll = () => {
  const request = new XMLHttpRequest();
  request.open("GET", location.href);
  request.setRequestHeader("X-Rekall-Poll", "1");
  request.responseType = "document";
  request.onloadend = () => {
    if (request.status === 401) return location.reload();
    const next = request.status === 200 ? request.response : null;
    for (const part of next ? partsOf(document) : []) {
      const fresh = next.getElementById(part.id);
      if (!fresh) return location.reload();
      if (fresh.isEqualNode(part) || part.contains(document.activeElement)) continue;
      part.replaceWith(document.adoptNode(fresh));
    }
    if (next && !next.body.hasAttribute("data-live")) return;
    setTimeout(poll, document.hidden ? 10000 : 1000);
  };
  request.send();
};
if (document.body.hasAttribute("data-live")) setTimeout(poll, 500);
