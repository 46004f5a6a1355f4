// Heat maps: a row for each y, a column for each x, and one or several measures.

function shade(measure, value) {
  if (measure.diverging) {
    const share = measure.high ? Math.abs(value) / measure.high : 0;
    return [`color-mix(in oklab, var(--heat-${value < 0 ? "negative" : "high"}) ${(share * 100).toFixed(1)}%, var(--heat-low))`, share];
  }
  const share = measure.high > measure.low ? (value - measure.low) / (measure.high - measure.low) : 0.5;
  return [`color-mix(in oklab, var(--heat-high) ${(share * 100).toFixed(1)}%, var(--heat-low))`, share];
}

function heatChart(spec) {
  const [xs, ys] = [spec.x.values, spec.y.values];
  let chosen = spec.measures[0];
  const about = el("span", { class: "about" });
  const scale = el("div", { class: "scale" });

  function draw(room) {
    about.textContent = [spec.about, chosen.about].filter(Boolean).join("; ");
    scale.replaceChildren(el("span", {}, number(chosen.low, 3)), el("i", { class: chosen.diverging ? "diverging" : null }), el("span", {}, number(chosen.high, 3)));
    const left = Math.min(Math.max(...ys.map((one) => width(number(one)))) + 12, room * 0.42);
    const cell = Math.min(Math.max((room - left - 2) / xs.length, 9), 76);
    const tall = 30;
    const [wide, height] = [Math.max(left + cell * xs.length + 2, Math.min(room, 240)), tall * ys.length + 42];
    const root = svg("svg", { width: wide, height, viewBox: `0 0 ${wide} ${height}` });
    const marks = [];
    // in every cell or in none: numbers in the few that happen to be short would stand out for nothing
    const written = present(chosen.values.flat()).every((value) => width(number(value, 2)) + 8 < cell);
    ys.forEach((y, row) => {
      root.append(label(left - 8, row * tall + tall / 2 + 4, shortened(number(y), left - 8), { "text-anchor": "end" }));
      xs.forEach((x, column) => {
        const value = chosen.values[row][column];
        const none = value === null || value === undefined;
        const box = svg("rect", { class: none ? "cell none" : "cell", x: left + column * cell, y: row * tall, width: cell, height: tall });
        root.append(box);
        if (!none) {
          const [paint, share] = shade(chosen, value);
          box.style.fill = paint;
          const text = number(value, 2);
          if (written) {
            const ink = label(left + (column + 0.5) * cell, row * tall + tall / 2 + 4, text, { "text-anchor": "middle" });
            ink.style.fill = share > 0.5 ? "var(--heat-on-high)" : "var(--heat-on-low)";
            root.append(ink);
          }
        }
        marks.push({
          x: left + (column + 0.5) * cell,
          y: (row + 0.5) * tall,
          head: `${spec.y.label} ${number(y)}, ${spec.x.label} ${number(x)}`.trim(),
          lines: spec.measures.map((one) => `${one.name}: ${number(one.values[row][column])}`),
          on: () => box.classList.add("on"),
          off: () => box.classList.remove("on"),
        });
      });
    });
    const widest = Math.max(...xs.map((x) => width(number(x)))) + 10;
    const every = Math.max(1, Math.ceil(widest / cell));
    xs.forEach((x, column) => {
      if (column % every === 0) root.append(label(left + (column + 0.5) * cell, tall * ys.length + 16, number(x), { "text-anchor": "middle", "aria-hidden": "true" }));
    });
    root.append(label(left, height - 4, spec.x.label, {}));
    const nearest = (x, y) => {
      const [column, row] = [Math.floor((x - left) / cell), Math.floor(y / tall)];
      return column >= 0 && column < xs.length && row >= 0 && row < ys.length ? row * xs.length + column : -1;
    };
    return { svg: root, marks, stride: xs.length, nearest };
  }

  const choice = (again) => (spec.measures.length < 2 ? null : el("select", {
    "aria-label": "Measure",
    change: (event) => { chosen = spec.measures[event.target.value]; again(); },
  }, spec.measures.map((one, place) => el("option", { value: place }, one.name))));
  const cells = ys.flatMap((y, row) => xs.map((x, column) => ({ x, y, row, column })));
  const columns = [
    { label: spec.y.label, get: (one) => one.y, number: numeric(ys) },
    { label: spec.x.label, get: (one) => one.x, number: numeric(xs) },
    ...spec.measures.map((measure) => ({ label: measure.name, title: measure.about, get: (one) => measure.values[one.row][one.column], number: true })),
  ];
  return chart(spec, draw, { choice, about, below: scale, numbers: numbersOf(cells, columns, spec.title) }).node;
}
