// A table that can be sorted by each column and filtered by words. Rows are made as they come into sight, for a plan may
// have ten thousand of them.

const CHUNK = 80;
const PRINTED = 400; // rows of a table on paper
const printed = []; // what makes them, for each table
const collator = new Intl.Collator("en", { numeric: true });

// columns: {label, get(row) -> value, show(row) -> node or text, number, wide}; choose: {label, get(row)} for a list of
// values to choose from; words(row) -> the text that a filter looks into
function table(rows, columns, { caption, choose, filter = rows.length > 8, cards = false, words, sort = null } = {}) {
  const text = words || ((row) => columns.map((column) => column.get(row)).join(" "));
  const lower = filter ? rows.map((row) => text(row).toLowerCase()) : [];
  const body = el("tbody");
  const count = el("span", { class: "count", role: "status" });
  const more = el("div", { "aria-hidden": "true" });
  const left = el("p", { class: "soft on-paper" });
  let shown = [];
  let made = 0;
  let by = sort ? sort.column : -1;
  let turned = sort ? sort.descending : false;

  const heads = columns.map((column, place) => {
    const button = el("button", { type: "button", click: () => sortBy(place) }, column.label);
    return el("th", { scope: "col", class: column.number ? "num" : null, title: column.title }, button);
  });
  const scroller = el(
    "div",
    { class: cards ? "table cards" : columns.length < 6 ? "table snug" : "table", tabindex: "0", role: "region", "aria-label": caption },
    el("table", {}, el("thead", {}, el("tr", {}, heads)), body),
    more,
  );
  const search = el("input", { type: "search", placeholder: "Filter by words", "aria-label": `Filter: ${caption}`, input: refresh });
  const choices = choose ? [...new Set(rows.map(choose.get))].sort(collator.compare) : [];
  const select = el("select", { "aria-label": choose ? choose.label : null, change: refresh },
    el("option", { value: "" }, choose ? `All ${choose.label}` : ""),
    choices.map((value) => el("option", { value }, value)));

  function sortBy(place) {
    turned = by === place ? !turned : Boolean(columns[place].number);
    by = place;
    refresh();
  }

  function compare(one, other) {
    const [a, b] = [columns[by].get(one), columns[by].get(other)];
    const empty = (value) => value === null || value === undefined || value === "";
    if (empty(a) || empty(b)) return empty(a) - empty(b);
    const order = typeof a === "number" && typeof b === "number" ? a - b : collator.compare(String(a), String(b));
    return turned ? -order : order;
  }

  function refresh() {
    const asked = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    shown = rows.filter((row, place) =>
      asked.every((word) => lower[place].includes(word)) && (!select.value || choose.get(row) === select.value));
    if (by >= 0) shown.sort(compare);
    heads.forEach((head, place) => {
      if (place === by) head.setAttribute("aria-sort", turned ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    count.textContent = shown.length === rows.length ? plural(rows.length, "row") : `${number(shown.length)} of ${plural(rows.length, "row")}`;
    body.replaceChildren();
    made = 0;
    scroller.scrollTop = 0;
    append();
    more.className = shown.length ? "" : "nothing";
    more.textContent = shown.length ? "" : "No row has all of these words.";
  }

  function append() {
    const next = shown.slice(made, made + CHUNK);
    made += next.length;
    body.append(...next.map((row) => el("tr", {}, columns.map((column) => {
      const value = column.show ? column.show(row) : column.number ? number(column.get(row)) : column.get(row);
      const kind = [column.number ? "num" : "", column.kind || ""].join(" ").trim();
      return el("td", { class: kind || null, "data-label": column.label }, value);
    }))));
  }

  scroller.addEventListener("scroll", () => {
    if (made < shown.length && scroller.scrollTop + scroller.clientHeight > scroller.scrollHeight - 600) append();
  }, { passive: true });
  printed.push(() => {
    while (made < Math.min(shown.length, PRINTED)) append();
    left.textContent = made < shown.length ? `${number(shown.length - made)} more rows are in the JSON file beside the page.` : "";
  });
  refresh();
  const tools = filter ? el("div", { class: "tools" }, search, choose && choices.length > 1 ? select : null, count) : null;
  return el("div", {}, tools, scroller, left);
}
