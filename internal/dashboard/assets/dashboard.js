// What the pages do beyond forms and links: copy, quick choices, live views. All of it works without, by hand.
"use strict";

// A form is sent once, however often its button is pressed. That is not noted in the form, where a live view would undo it, and
// the document listens, for the forms that come with one.
let sent = new WeakSet();
document.addEventListener("submit", (event) => {
  if (!event.target.matches("form[data-once]")) return;
  if (sent.has(event.target)) event.preventDefault();
  else if (!event.submitter?.name) sent.add(event.target);
});
// A navigation that was stopped brings no page: the form can be sent again.
window.navigation?.addEventListener("navigateerror", () => (sent = new WeakSet()));

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

// update makes a node like a newer one and leaves the rest of it as it is: the focus stays where it was. What leads elsewhere is
// replaced: nobody is to press a button that became another a moment ago.
const leadsTo = (node) => [node.nodeName, node.id, node.getAttribute?.("href"), node.getAttribute?.("action")].join();
const update = (node, newer) => {
  if (node.isEqualNode(newer)) return;
  if (leadsTo(node) !== leadsTo(newer)) return node.replaceWith(document.importNode(newer, true));
  if (node.nodeType !== Node.ELEMENT_NODE) {
    node.nodeValue = newer.nodeValue;
    return;
  }
  for (const { name } of [...node.attributes]) if (!newer.hasAttribute(name)) node.removeAttribute(name);
  for (const { name, value } of newer.attributes) if (node.getAttribute(name) !== value) node.setAttribute(name, value);
  const nodes = [...node.childNodes];
  const newerNodes = [...newer.childNodes];
  for (const extra of nodes.slice(newerNodes.length)) extra.remove();
  newerNodes.forEach((child, i) => (i < nodes.length ? update(nodes[i], child) : node.append(document.importNode(child, true))));
};

// Live parts are taken from the page itself, read again. An XMLHttpRequest parses it without running anything. It keeps no
// session alive, and shows the sign-in form when the session has ended, unless something is being typed.
const news = document.getElementById("news");
const typed = () => document.getElementById("problem") || [...document.querySelectorAll("main input")].some((input) => input.value !== input.defaultValue);
const live = document.body.dataset.live; // not where the page stands: that may be where a form was sent
const poll = () => {
  const request = new XMLHttpRequest();
  request.open("GET", live);
  request.setRequestHeader("X-Rekall-Poll", "1");
  request.responseType = "document";
  request.onloadend = () => {
    if (request.status === 401 && typed()) {
      news.className = "warning";
      news.textContent = "Your session has ended. What you see may be old, and a form that you send changes nothing.";
      return;
    }
    if (request.status === 401) return location.replace(live);
    const next = request.status === 200 ? request.response : null;
    for (const part of next ? document.querySelectorAll("[data-part]") : []) {
      const said = part.dataset.news;
      update(part, next.getElementById(part.id));
      if (part.dataset.news && part.dataset.news !== said) news.textContent = part.dataset.news;
    }
    if (next && !next.body.dataset.live) return;
    const seldom = document.hidden || performance.now() > 90000; // a revocation is confirmed within a minute, a rotation lasts for days
    setTimeout(poll, seldom ? 10000 : 1000);
  };
  request.send();
};
if (live) setTimeout(poll, 500);
