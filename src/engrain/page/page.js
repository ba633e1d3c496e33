"use strict";

// A heading sorts its table: ascending, descending, then as the report had it. What says nothing stays at the end.
const NEXT = { none: "ascending", ascending: "descending", descending: "none" };

function compared(one, other) {
  const [a, b] = [Number(one.dataset.value), Number(other.dataset.value)];
  return a - b || one.textContent.localeCompare(other.textContent, "en", { numeric: true });
}

function sort(heading) {
  const order = NEXT[heading.getAttribute("aria-sort")];
  for (const other of heading.parentElement.cells) other.setAttribute("aria-sort", other === heading ? order : "none");
  const body = heading.closest("table").tBodies[0];
  const rows = [...body.rows].sort((one, other) => {
    const [a, b] = [one, other].map((row) => row.cells[heading.cellIndex]);
    const [gone, lost] = [a, b].map((cell) => cell.hasAttribute("data-missing"));
    const first = order === "none" ? 0 : gone - lost || (order === "ascending" ? 1 : -1) * compared(a, b);
    return first || one.dataset.place - other.dataset.place;
  });
  body.append(...rows);
}

for (const table of document.querySelectorAll("table")) {
  [...table.tBodies[0].rows].forEach((row, place) => (row.dataset.place = place));
  for (const heading of table.tHead.rows[0].cells)
    heading.firstElementChild.addEventListener("click", () => sort(heading));
}

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.dataset.theme = (root.dataset.theme ?? dark) === "dark" ? "light" : "dark";
});
