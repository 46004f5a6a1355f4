// What a chart shares with the others: room, hover, arrow keys, a legend, its numbers as a table. Each is drawn as wide as
// there is room.

const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "1 2"];
const colour = (place) => `var(--series-${(place % 6) + 1})`;
const dash = (place) => DASHES[place % 6] || null;
const numeric = (values) => values.every((value) => typeof value === "number");
const present = (values) => values.filter((value) => value !== null && value !== undefined);
const width = (text) => String(text).length * 6.7;

function ticks(low, high, most) {
  const span = high - low || 1;
  const rough = span / Math.max(most, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((one) => one >= rough * 0.999);
  const found = [];
  for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-6; place += 1) {
    found.push(Number((place * step).toPrecision(12)));
  }
  return found;
}

const shortened = (text, room) => (width(text) <= room ? text : `${text.slice(0, Math.max(Math.floor(room / 6.7) - 1, 1))}\u2026`);

function label(x, y, text, attributes) {
  return svg("text", { x, y, ...attributes }, text);
}

// draw(width) -> {svg, marks, stride, nearest}; a mark is {x, y, head, lines, on(), off()}. An arrow key up or down walks `stride` marks.
function chart(spec, draw, extra) {
  const plot = el("div", { class: "plot", tabindex: "0", role: "group", "aria-label": `${spec.title}. Arrow keys walk through its numbers.` });
  let drawn = null;
  let at = -1;
  let byKeys = false;
  let had = 0;

  function redraw() {
    const room = Math.floor(plot.clientWidth);
    if (!room || room === had) return;
    had = room;
    leave();
    drawn = draw(room);
    drawn.svg.setAttribute("role", "img");
    drawn.svg.setAttribute("aria-label", [spec.title, spec.about].filter(Boolean).join(": "));
    plot.replaceChildren(drawn.svg);
  }

  function leave() {
    if (drawn && at >= 0 && drawn.marks[at]) drawn.marks[at].off();
    at = -1;
    hideTip();
  }

  function go(place, x, y, keys) {
    if (place !== at) leave();
    at = place;
    byKeys = keys;
    const mark = drawn.marks[place];
    mark.on();
    showTip(mark.head, mark.lines, x, y, keys);
  }

  function goByKeys(place) {
    const box = drawn.svg.getBoundingClientRect();
    go(place, box.left + drawn.marks[place].x, box.top + drawn.marks[place].y, true);
  }

  plot.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: drawn.stride, ArrowUp: -drawn.stride }[event.key];
    if (event.key === "Escape") leave();
    if (!step || !drawn.marks.length) return;
    event.preventDefault();
    goByKeys(Math.min(Math.max(at < 0 ? 0 : at + step, 0), drawn.marks.length - 1));
  });
  const pointed = (event) => {
    const box = drawn.svg.getBoundingClientRect();
    const place = drawn.nearest(event.clientX - box.left, event.clientY - box.top);
    if (place < 0) leave();
    else go(place, event.clientX, event.clientY, false);
  };
  plot.addEventListener("pointermove", (event) => drawn && pointed(event));
  plot.addEventListener("pointerdown", (event) => drawn && pointed(event));
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  window.addEventListener("scroll", () => {
    if (at >= 0 && byKeys) goByKeys(at); // the place moved on with the page; a pointer did not
    else leave();
  }, { passive: true });
  new ResizeObserver(() => requestAnimationFrame(redraw)).observe(plot);

  const again = () => { had = 0; redraw(); };
  return {
    again,
    node: el("figure", { class: "chart" },
      el("figcaption", {}, el("span", { class: "title" }, spec.title), extra.choice ? extra.choice(again) : null,
        extra.about || (spec.about ? el("span", { class: "about" }, spec.about) : null)),
      extra.legend, plot, extra.below, extra.numbers),
  };
}

function numbersOf(rows, columns, caption) {
  const made = el("details", {}, el("summary", {}, "Numbers"));
  made.addEventListener("toggle", () => {
    if (made.open && made.children.length === 1) made.append(table(rows, columns, { caption, filter: rows.length > 12 }));
  });
  return made;
}

function legend(series) {
  if (series.length < 2) return null;
  return el("ul", { class: "legend" }, series.map((one, place) => el("li", {},
    svg("svg", { width: 22, height: 8, "aria-hidden": "true" },
      svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: colour(place), "stroke-width": 2.25, "stroke-dasharray": dash(place) })),
    one.name)));
}

const interval = (one, place) =>
  one.low && one.low[place] !== null && one.high[place] !== null ? ` (${number(one.low[place])} to ${number(one.high[place])})` : "";
