"use strict";
// The table of all runs: a click on a column sorts by it, numbers as numbers, empty cells last.
const table = document.querySelector(".sortable"), body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells];
const value = (row, column) => {
  const text = row.cells[column].textContent.trim(), number = Number(text.replaceAll(",", ""));
  return text === "" || Number.isNaN(number) ? text : number;
};
const sortBy = (column, sign) => {
  const compare = (a, b) => {
    const [one, other] = [value(a, column), value(b, column)];
    if (one === "" || other === "") return (one === "") - (other === "");
    if (typeof one === "number" && typeof other === "number") return sign * (one - other);
    return sign * String(one).localeCompare(String(other), "en", {numeric: true});
  };
  body.append(...[...body.rows].sort(compare));
};
heads.forEach((head, column) => {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const up = head.ariaSort !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.ariaSort = up ? "ascending" : "descending";
    sortBy(column, up ? 1 : -1);
  });
});
// The field above it: runs that have all of its words.
const find = document.querySelector(".find"), field = find.querySelector("input");
const search = () => {
  const words = field.value.toLowerCase().split(/\s+/), rows = [...body.rows];
  for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  find.querySelector("output").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} runs`;
};
find.hidden = false;
field.addEventListener("input", search);
search();
