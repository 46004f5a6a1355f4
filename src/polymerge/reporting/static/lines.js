// Curves over numbers or names, with bands and marked places.

function linesChart(spec) {
  const values = spec.x.values;
  const onScale = numeric(values);
  const all = spec.series.flatMap((one) => present([...one.values, ...(one.low || []), ...(one.high || [])]));
  let low = all.length ? Math.min(...all) : 0;
  let high = all.length ? Math.max(...all) : 1;
  if (spec.zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  const pad = (high - low || Math.abs(high) || 1) * 0.08;
  if (!spec.zero || low < 0) low -= pad;
  if (!spec.zero || high > 0) high += pad;

  function draw(room) {
    const height = room < 480 ? 230 : 280;
    const levels = ticks(low, high, 6);
    const box = { left: Math.max(...levels.map((one) => width(number(one)))) + 14, right: room - 18, top: spec.marks.length ? 40 : 26, bottom: height - 44 };
    const first = onScale ? Math.min(...values) : 0;
    const last = onScale ? Math.max(...values) : values.length - 1;
    const across = (value) => box.left + (last > first ? (value - first) / (last - first) : 0.5) * (box.right - box.left);
    const xs = values.map((value, place) => across(onScale ? value : place));
    const down = (value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top);
    const root = svg("svg", { width: room, height, viewBox: `0 0 ${room} ${height}` });
    for (const level of levels) {
      root.append(svg("line", { class: level === 0 ? "axis" : "grid", x1: box.left, x2: box.right, y1: down(level), y2: down(level) }));
      root.append(label(box.left - 8, down(level) + 4, number(level), { "text-anchor": "end", "aria-hidden": "true" }));
    }
    const widest = Math.max(...values.map((value) => width(number(value)))) + 14;
    const every = Math.max(1, Math.ceil((values.length * widest) / (box.right - box.left)));
    values.forEach((value, place) => {
      if (place % every) return;
      const half = width(number(value)) / 2;
      const anchor = xs[place] - half < 0 ? "start" : xs[place] + half > room ? "end" : "middle";
      root.append(label(xs[place], box.bottom + 18, shortened(number(value), 130), { "text-anchor": anchor, "aria-hidden": "true" }));
    });
    root.append(label((box.left + box.right) / 2, height - 6, spec.x.label, { "text-anchor": "middle" }));
    root.append(label(0, 14, shortened(spec.y, room), {}));
    const marked = spec.marks.map((one) => ({ ...one, x: onScale ? across(one.at) : xs[values.indexOf(one.at)] })).filter((one) => one.x >= 0);
    marked.sort((one, other) => one.x - other.x).forEach((one, place) => {
      const left = one.x + width(one.label) + 8 > room || (place === 0 && marked.length > 1 && marked[1].x - one.x < width(one.label) + 10 && one.x > width(one.label) + box.left);
      root.append(svg("line", { class: "mark", x1: one.x, x2: one.x, y1: box.top - 12, y2: box.bottom }));
      root.append(label(one.x + (left ? -5 : 5), box.top - 4, one.label, { class: "mark-label", "text-anchor": left ? "end" : "start" }));
    });
    const cross = svg("line", { class: "cross", y1: box.top, y2: box.bottom, visibility: "hidden" });
    root.append(cross);
    const dots = values.map(() => []);
    spec.series.forEach((one, place) => {
      if (one.low) root.append(band(one, xs, down, place));
      let path = "";
      let pen = false;
      one.values.forEach((value, where) => {
        if (value === null || value === undefined) { pen = false; return; }
        path += `${pen ? "L" : "M"}${xs[where].toFixed(1)},${down(value).toFixed(1)}`;
        pen = true;
      });
      root.append(svg("path", { d: path, fill: "none", stroke: colour(place), "stroke-width": 2.25, "stroke-linejoin": "round", "stroke-dasharray": dash(place) }));
      one.values.forEach((value, where) => {
        if (value === null || value === undefined) return;
        const dot = svg("circle", { class: "dot", cx: xs[where], cy: down(value), r: values.length > 50 ? 1.5 : 3.5, fill: colour(place) });
        dots[where].push(dot);
        root.append(dot);
      });
    });
    const marks = values.map((value, where) => ({
      x: xs[where],
      y: dots[where].length ? Number(dots[where][0].getAttribute("cy")) : box.bottom,
      head: `${spec.x.label} ${number(value)}`,
      lines: spec.series.map((one) => `${one.name}: ${number(one.values[where])}${interval(one, where)}`)
        .concat(spec.marks.filter((one) => one.at === value).map((one) => one.label)),
      on() {
        cross.setAttribute("x1", xs[where]);
        cross.setAttribute("x2", xs[where]);
        cross.setAttribute("visibility", "visible");
        dots[where].forEach((dot) => dot.setAttribute("r", 5));
      },
      off() {
        cross.setAttribute("visibility", "hidden");
        dots[where].forEach((dot) => dot.setAttribute("r", values.length > 50 ? 1.5 : 3.5));
      },
    }));
    const nearest = (x) => xs.reduce((best, one, place) => (Math.abs(one - x) < Math.abs(xs[best] - x) ? place : best), 0);
    return { svg: root, marks, stride: 1, nearest };
  }

  const columns = [{ label: spec.x.label, get: (place) => values[place], number: onScale }];
  for (const one of spec.series) {
    columns.push({ label: one.name, get: (place) => one.values[place], number: true });
    if (one.low) {
      columns.push({ label: `${one.name}, low`, get: (place) => one.low[place], number: true });
      columns.push({ label: `${one.name}, high`, get: (place) => one.high[place], number: true });
    }
  }
  return chart(spec, draw, { legend: legend(spec.series), numbers: numbersOf(values.map((_, place) => place), columns, spec.title) }).node;
}

function band(one, xs, down, place) {
  const there = xs.map((_, where) => where).filter((where) => one.low[where] !== null && one.high[where] !== null);
  const edge = (values, where) => `${xs[where].toFixed(1)},${down(values[where]).toFixed(1)}`;
  const points = [...there.map((where) => edge(one.high, where)), ...there.reverse().map((where) => edge(one.low, where))];
  return svg("polygon", { points: points.join(" "), fill: colour(place), opacity: 0.14 });
}
