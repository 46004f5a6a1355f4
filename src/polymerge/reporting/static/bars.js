// Horizontal bars with intervals, a group for each label; and which chart is drawn by what.

function barsChart(spec) {
  const all = spec.series.flatMap((one) => present([...one.values, ...(one.low || []), ...(one.high || [])]));
  const [low, high] = [Math.min(0, ...all), Math.max(0, ...all)];

  function draw(room) {
    const longest = Math.max(...spec.labels.map(width)) + 12;
    const above = longest > room * 0.4;
    const left = above ? 0 : longest;
    const values = spec.series.flatMap((one) => present(one.values).map((value) => width(number(value))));
    const right = room - Math.max(0, ...values) - 22;
    const thick = 15;
    const group = spec.series.length * (thick + 3) + 12 + (above ? 18 : 0);
    const across = (value) => left + 4 + ((value - low) / (high - low || 1)) * (right - left - 4);
    const height = spec.labels.length * group + 24;
    const root = svg("svg", { width: room, height, viewBox: `0 0 ${room} ${height}` });
    const levels = ticks(low, high, room < 480 ? 3 : 6);
    for (const level of levels) {
      root.append(svg("line", { class: level === 0 ? "axis" : "grid", x1: across(level), x2: across(level), y1: 0, y2: height - 22 }));
      root.append(label(across(level), height - 6, number(level), { "text-anchor": level === levels[0] && left < 12 ? "start" : "middle", "aria-hidden": "true" }));
    }
    const marks = [];
    spec.labels.forEach((name, place) => {
      const top = place * group + 4;
      const back = svg("rect", { x: 0, y: place * group, width: room, height: group, fill: "transparent" });
      root.prepend(back);
      const beside = top + (spec.series.length * (thick + 3)) / 2 + 3;
      root.append(label(above ? 0 : left - 10, above ? top + 10 : beside, shortened(name, above ? room : left), { "text-anchor": above ? "start" : "end" }));
      spec.series.forEach((one, which) => {
        const value = one.values[place];
        if (value === null || value === undefined) return;
        const y = top + (above ? 18 : 0) + which * (thick + 3);
        const [start, end] = [across(Math.min(0, value)), across(Math.max(0, value))];
        root.append(svg("rect", { class: "bar", x: start, y, width: Math.max(end - start, 1), height: thick, rx: 1.5, fill: colour(which), opacity: 0.85 }));
        if (one.low && one.low[place] !== null && one.high[place] !== null) {
          const [from, to] = [across(one.low[place]), across(one.high[place])];
          const middle = y + thick / 2;
          root.append(svg("path", { class: "whisker", fill: "none", d: `M${from},${middle}H${to}M${from},${middle - 3}v6M${to},${middle - 3}v6` }));
        }
        root.append(label(room - 2, y + thick - 3, number(value), { class: "value", "text-anchor": "end" }));
      });
      marks.push({
        x: left + 20, y: top + group / 2, head: name,
        lines: spec.series.map((one) => `${one.name}: ${number(one.values[place])}${interval(one, place)}`),
        on: () => back.setAttribute("class", "row-on"),
        off: () => back.removeAttribute("class"),
      });
    });
    const nearest = (x, y) => (y >= 0 && y < spec.labels.length * group ? Math.floor(y / group) : -1);
    return { svg: root, marks, stride: 1, nearest };
  }

  const columns = [{ label: "", get: (place) => spec.labels[place] }];
  for (const one of spec.series) {
    columns.push({ label: one.name, get: (place) => one.values[place], number: true });
    if (one.low) {
      columns.push({ label: "low", get: (place) => one.low[place], number: true });
      columns.push({ label: "high", get: (place) => one.high[place], number: true });
    }
  }
  const keys = spec.series.length < 2 ? null : el("ul", { class: "legend" }, spec.series.map((one, place) => el("li", {},
    svg("svg", { width: 12, height: 12, "aria-hidden": "true" }, svg("rect", { width: 12, height: 12, rx: 2, fill: colour(place), opacity: 0.85 })), one.name)));
  return chart(spec, draw, { legend: keys, numbers: numbersOf(spec.labels.map((_, place) => place), columns, spec.title) }).node;
}

const KINDS = { lines: linesChart, heat: heatChart, bars: barsChart };

// Charts of one kind that are narrow enough stand side by side where there is room.
function charts(specs) {
  const groups = [];
  for (const spec of specs) {
    const narrow = spec.kind === "lines" || (spec.kind === "heat" && spec.x.values.length <= 8);
    const last = groups[groups.length - 1];
    if (narrow && last && last.kind === spec.kind) last.nodes.push(KINDS[spec.kind](spec));
    else groups.push({ kind: narrow ? spec.kind : null, nodes: [KINDS[spec.kind](spec)] });
  }
  return groups.map((group) => el("div", { class: group.nodes.length > 1 ? "side" : null }, group.nodes));
}
