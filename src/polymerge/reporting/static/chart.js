// Charts: Vega-Lite specifications, drawn in the colours of the theme; hover, arrow keys, and each one's numbers as a table.

const drawn = []; // what to draw again when the theme changes
const dark = () => getComputedStyle(document.documentElement).colorScheme === "dark";

const rowsOf = (view) => view.spec.datasets[view.spec.data.name];

// What a view shows, in words, for whoever does not see it: how many numbers, and which are the smallest and the largest.
function inWords(view) {
  const title = Object.fromEntries(view.columns);
  const rows = rowsOf(view).filter((row) => typeof row.value === "number").sort((one, other) => one.value - other.value);
  if (!rows.length) return "No numbers";
  const where = (row) => [row.series, ...view.keys.map((key) => `${title[key]} ${number(row[key])}`)].filter(Boolean).join(", ");
  const told = (row) => `${number(row.value)} (${where(row)})`;
  const [low, high] = [rows[0], rows[rows.length - 1]];
  return `${plural(rows.length, "number")}, ${low.value === high.value ? `each ${number(low.value)}` : `from ${told(low)} to ${told(high)}`}`;
}

// A chart's place; `data.themes` has a Vega-Lite configuration for each theme.
function chart(figure) {
  let view = figure.views[0];
  let at = -1;
  let shown = null;
  const canvas = el("div");
  const plot = el("div", { class: "plot", tabindex: "0", role: "group", "aria-label": `${figure.title}. Arrow keys walk through its numbers.` }, canvas);
  const about = el("span", { class: "about" }, view.about);
  const numbers = el("details", { toggle: () => { if (numbers.open) list(); } }, el("summary", {}, "Numbers"));
  const choice = figure.views.length < 2 ? null : el("select", {
    "aria-label": "Measure",
    change: (event) => {
      view = figure.views[event.target.value];
      about.textContent = view.about;
      draw();
    },
  }, figure.views.map((one, place) => el("option", { value: place }, one.name)));

  async function draw() {
    const theme = data.themes[dark() ? "dark" : "light"];
    const room = plot.clientWidth;
    const axisY = { labelLimit: Math.round(room * 0.36) };
    const legend = { ...theme.legend, columns: Math.max(1, Math.floor(room / 260)), labelLimit: Math.min(240, Math.round(room * 0.52)) };
    const tooltip = (_handler, event, _item, row) => (row ? tell(row, event.clientX, event.clientY, false) : leave());
    shown?.finalize();
    shown = await vegaEmbed(canvas, structuredClone(view.spec), {
      actions: false, ast: true, renderer: "svg", tooltip, config: { ...theme, background: "transparent", axisY, legend },
    });
    for (const name of ["role", "aria-roledescription", "aria-label"]) canvas.removeAttribute(name); // the group has them
    const made = canvas.querySelector("svg");
    made.setAttribute("role", "img");
    made.setAttribute("aria-label", [figure.title, view.about, inWords(view)].filter(Boolean).join(". "));
  }

  // What is known where something points at: every row of the chart that has the same place.
  function tell(pointed, x, y, say) {
    const title = Object.fromEntries(view.columns);
    const rows = rowsOf(view).filter((row) => view.keys.every((key) => row[key] === pointed[key]));
    const lines = rows.map((row) => {
      const interval = row.low === undefined || row.low === null ? "" : ` (${number(row.low)} to ${number(row.high)})`;
      return `${row.series === undefined ? title.value : row.series}: ${number(row.value)}${interval}`;
    });
    for (const [place, text] of view.marks) if (place === pointed.x) lines.push(text);
    showTip(view.keys.map((key) => `${title[key]} ${number(pointed[key])}`).join(", "), lines, x, y, say);
  }

  function leave() {
    at = -1;
    hideTip();
  }

  function list() {
    if (numbers.children.length > 1) numbers.lastChild.remove();
    const isNumber = (field) => rowsOf(view).every((row) => typeof row[field] !== "string");
    const columns = view.columns.map(([field, label]) => ({ label, get: (row) => row[field], number: isNumber(field) }));
    numbers.append(table(rowsOf(view), columns, { caption: figure.title, filter: rowsOf(view).length > 12 }));
  }

  plot.addEventListener("keydown", (event) => {
    const places = [...([...plot.querySelectorAll(".mark-rect.role-mark")].pop()?.children || [])];
    const along = view.keys.length > 1 ? new Set(rowsOf(view).map((row) => row.x)).size : 1;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: along, ArrowUp: -along }[event.key];
    if (event.key === "Escape") leave();
    if (!step || !places.length) return;
    event.preventDefault();
    at = Math.min(Math.max(at < 0 ? 0 : at + step, 0), places.length - 1);
    const box = places[at].getBoundingClientRect();
    tell(places[at].__data__.datum, box.left + box.width / 2, box.top + box.height / 2, true);
  });
  plot.addEventListener("blur", leave);
  drawn.push(draw);
  return el("figure", { class: "chart" },
    el("figcaption", {}, el("span", { class: "title" }, figure.title), choice, about), plot, numbers);
}

// Charts that are narrow enough stand side by side where there is room.
function charts(figures) {
  const groups = [];
  for (const figure of figures) {
    const last = groups[groups.length - 1];
    if (last && !figure.wide && !last.wide) last.nodes.push(chart(figure));
    else groups.push({ wide: figure.wide, nodes: [chart(figure)] });
  }
  return groups.map((group) => el("div", { class: group.nodes.length > 1 ? "side" : null }, group.nodes));
}

function drawAll() {
  hideTip();
  document.documentElement.dataset.drawn = dark() ? "dark" : "light"; // for paper, which is light
  return Promise.all(drawn.map((draw) => draw()));
}
