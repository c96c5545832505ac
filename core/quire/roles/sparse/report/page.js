"use strict";
const list = document.getElementById("list");
const field = document.getElementById("number");
const said = document.getElementById("said");
const rows = [...list.children];

function filter() {
  const wanted = field.value.trim();
  let left = 0;
  for (const row of rows) {
    row.hidden = wanted !== "" && !row.dataset.number.startsWith(wanted);
    row.style.display = row.hidden ? "none" : "";
    left += row.hidden ? 0 : 1;
  }
  said.textContent = wanted === "" ? "" : left ? `${left} of ${rows.length}` : `latent ${wanted} is not on this page`;
}

function go(event) {
  event.preventDefault();
  const wanted = field.value.trim();
  if (document.getElementById(`latent-${wanted}`)) location.hash = `latent-${wanted}`;
  filter();
}

function sort() {
  const by = document.getElementById("sort").value;
  const key = { number: "number", share: "share", rare: "share", peak: "peak" }[by];
  const sign = by === "number" || by === "rare" ? 1 : -1;
  rows.sort((a, b) => sign * (Number(a.dataset[key]) - Number(b.dataset[key])));
  list.append(...rows);
}

function mark() {
  for (const row of rows) row.className = location.hash === `#latent-${row.dataset.number}` ? "here" : "";
  const target = document.getElementById(location.hash.slice(1));
  document.title = document.title.replace(/^Latent \d+ · /, "");
  if (target) document.title = `Latent ${location.hash.slice(8)} · ${document.title}`;
}

field.addEventListener("input", filter);
document.getElementById("find").addEventListener("submit", go);
document.getElementById("sort").addEventListener("change", sort);
window.addEventListener("hashchange", mark);
const asked = new URLSearchParams(location.search).get("latent");
if (asked !== null) {
  field.value = asked;
  filter();
  if (document.getElementById(`latent-${asked}`)) location.hash = `latent-${asked}`;
}
mark();
