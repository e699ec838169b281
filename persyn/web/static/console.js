"use strict";
// Every page can be read without this. It refreshes a page of a running run, labels the cells of tables that become
// cards on a phone, and lets Ctrl+Enter ask.

const page = document.body;
let misses = 0;

async function look() {
  if (!document.hidden) {
    try {
      const answer = await fetch(location.href, { redirect: "error" });
      if (!answer.ok) throw new Error(answer.statusText);
      misses = 0;
      show(new DOMParser().parseFromString(await answer.text(), "text/html"));
    } catch {
      misses += 1;
    }
    page.classList.toggle("away", misses > 1);
  }
  if (page.dataset.live) setTimeout(look, 1000 * page.dataset.live * Math.min(1 + misses, 10));
}

// What somebody is in, with the keyboard or a selection, is left as it is until they leave it.
function show(fresh) {
  label(fresh);
  for (const part of document.querySelectorAll("[data-part]")) {
    const found = fresh.getElementById(part.id);
    const isInUse = part.contains(document.activeElement) || !getSelection().isCollapsed;
    if (found && !isInUse && found.innerHTML !== part.innerHTML) {
      const places = [...part.querySelectorAll(".scroll")].map((box) => [box.scrollLeft, box.scrollTop]);
      part.replaceChildren(...found.childNodes);
      part.querySelectorAll(".scroll").forEach((box, n) => places[n] && box.scrollTo(...places[n]));
    }
  }
  if (fresh.body.dataset.live) {
    page.dataset.live = fresh.body.dataset.live;
  } else {
    delete page.dataset.live;
    document.getElementById("pausing")?.remove();
  }
}

// On a phone a row becomes a card, each value beside the head of its column.
function label(root) {
  for (const table of root.querySelectorAll(".cards table")) {
    const heads = [...table.querySelectorAll("thead th")].map((head) => head.textContent);
    for (const row of table.querySelectorAll("tbody tr")) {
      [...row.children].forEach((cell, n) => { cell.dataset.label = heads[n] ?? ""; });
    }
    table.classList.add("labelled");
  }
}

label(document);
if (page.dataset.live) setTimeout(look, 1000 * page.dataset.live);

document.querySelector("textarea[name=query]")?.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.target.form.requestSubmit();
});
