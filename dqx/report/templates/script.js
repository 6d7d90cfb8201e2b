// Sort a table by a column: numbers by value, text by its natural order; once more turns it round, a third time undoes it.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[table.tBodies.length - 1];
  const original = [...body.rows];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.ariaSort = "none";
    button.addEventListener("click", () => {
      const order = { none: "ascending", ascending: "descending", descending: "none" }[head.ariaSort];
      for (const other of heads) other.ariaSort = "none";
      head.ariaSort = order;
      body.append(...(order === "none" ? original : sorted(original, column, order === "ascending" ? 1 : -1)));
    });
  });
}

function sorted(rows, column, sign) {
  const keys = new Map(rows.map((row) => [row, key(row.cells[column])]));
  return [...rows].sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    if (x === null || y === null) return (x === null) - (y === null); // what is missing comes last either way
    if (typeof x === "number" && typeof y === "number") return sign * (x - y);
    return sign * String(x).localeCompare(String(y), "en", { numeric: true });
  });
}

function key(cell) {
  if (cell.dataset.number !== undefined) return Number(cell.dataset.number);
  const text = cell.textContent.trim();
  return text === "" || text === "-" || cell.classList.contains("missing") ? null : text;
}

// A link into something folded opens it.
function unfold() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (target) target.scrollIntoView();
}
addEventListener("hashchange", unfold);
unfold();
