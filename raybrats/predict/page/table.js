// The table of cases: sorted by a column, filtered by name and Dice, one score at a time.
const table = document.getElementById("cases");

function sortBy(header) {
  const column = [...header.parentNode.children].indexOf(header);
  const descending = header.getAttribute("aria-sort") === "ascending";
  const key = (row) => row.children[column].dataset.value ?? row.children[column].textContent;
  const numeric = column > 0;
  const order = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (numeric && (x === "" || y === "")) return (x === "") - (y === ""); // none comes last
    const found = numeric ? x - y : x.localeCompare(y, "en", { numeric: true });
    return descending ? -found : found;
  };
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
}

function filter() {
  const words = document.getElementById("filter-case").value.toLowerCase();
  const below = parseFloat(document.getElementById("filter-dice").value);
  let count = 0;
  for (const row of table.tBodies[0].rows) {
    const dice = parseFloat(row.dataset.dice);
    const named = row.cells[0].textContent.toLowerCase().includes(words);
    row.hidden = !named || (!Number.isNaN(below) && !(dice < below));
    count += !row.hidden;
  }
  document.getElementById("filter-count").textContent = `${count} of ${table.tBodies[0].rows.length}`;
}

function showScore(score) {
  for (const cell of table.querySelectorAll("[data-score]")) cell.hidden = cell.dataset.score !== score;
}

if (table) {
  for (const header of table.tHead.rows[0].cells)
    header.querySelector("button").addEventListener("click", () => sortBy(header));
  for (const id of ["filter-case", "filter-dice"]) document.getElementById(id).addEventListener("input", filter);
  const score = document.getElementById("score");
  score.addEventListener("change", () => showScore(score.value));
  showScore(score.value);
  filter();
}
