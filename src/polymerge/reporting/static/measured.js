// Sections of what was measured: overlaps, searches, scores.

// --- overlap

function overlapsSection(overlaps) {
  const many = overlaps.length > 1;
  return section("overlap", "Overlap of the deltas",
    "How the deltas lie to each other before they are merged: where they cancel, and where they use the same directions.",
    overlaps.map((overlap) => run(overlap, many, overlapFacts(overlap), charts(overlap.charts), notes(overlap.notes),
      el("h4", {}, "By place"), placesTable(overlap), tensorsTable(overlap))));
}

function overlapFacts(overlap) {
  const total = overlap.totals[0];
  return [
    soft(`${overlap.models.join(", ")}; kept entries are the largest ${number(overlap.density)} of each tensor${overlap.rank === null ? "" : `, directions the ${overlap.rank} with the largest singular values`}.`),
    facts([
      ["Mass that cancels", number(total.conflict_mass, 3), `of two unrelated deltas of one size: ${number(overlap.unrelated)}`],
      ["Conflicts of sign", number(total.conflict, 3), "of the entries that both change"],
      ["Cosine", number(total.cosine, 3), "mean over pairs"],
      ...total.deltas.map((delta) => [`Norm of ${delta.model}`, number(delta.norm, 3), delta.kept === null ? null : `${number(delta.kept, 3)} of it squared in the kept entries`]),
    ]),
  ];
}

const OVERLAP = [["cosine", "cosine"], ["conflict", "conflict"], ["conflict_mass", "by mass"], ["common", "common"], ["left", "left"], ["right", "right"]];

function placesTable(overlap) {
  const columns = [
    { label: "where", get: (row) => (row.layer === null ? row.part : `${row.part} ${row.layer}`) },
    { label: "module", get: (row) => row.module },
    { label: "entries", get: (row) => row.entries, number: true },
    ...OVERLAP.map(([name, label]) => ({ label, get: (row) => row[name], show: (row) => number(row[name], 3), number: true })),
    ...overlap.models.map((model) => {
      const norm = (row) => (row.deltas.find((delta) => delta.model === model) || { norm: null }).norm;
      return { label: `norm ${model}`, get: norm, show: (row) => number(norm(row), 3), number: true };
    }),
  ];
  return table(overlap.places, columns, { caption: `Overlap of ${overlap.label} by place` });
}

function tensorsTable(overlap) {
  if (!overlap.tensors.length) return null;
  const columns = [
    { label: "tensor", kind: "name", get: (row) => row[0], show: (row) => mono(row[0]) },
    { label: "entries", get: (row) => row[1], number: true },
    ...OVERLAP.map(([, label], place) => ({ label, get: (row) => row[place + 2], show: (row) => number(row[place + 2], 3), number: true })),
  ];
  const some = overlap.tensors.length < overlap.tensors_all ? `, the ${number(overlap.tensors.length)} with most conflict` : "";
  const made = el("details", {}, el("summary", {}, `Tensor by tensor (${number(overlap.tensors_all)}${some})`));
  made.addEventListener("toggle", () => {
    if (made.open && made.children.length === 1) made.append(table(overlap.tensors, columns, { caption: `Overlap of ${overlap.label} by tensor`, filter: true }));
  });
  return made;
}

// --- searches

function searchesSection(searches) {
  const many = searches.length > 1;
  return section("search", "The search", null, searches.map((search) => run(search, many,
    el("p", {}, `Chosen by ${search.chosen_by}: `, el("strong", {}, `${search.vary.join(", ")} = ${point(search.chosen)}`), searchMore(search)),
    charts(search.charts), searchTable(search))));
}

function searchMore(search) {
  const said = [];
  if (search.minima && search.minima.length > 1) said.push(`; as small a difference at ${point(search.minima)}`);
  if (search.best && point(search.best) !== point(search.chosen)) said.push(`; best by labels: ${point(search.best)}`);
  if (search.prompts) said.push(`. ${plural(search.prompts, "prompt")}${search.seed === null ? "" : `, drawn with seed ${search.seed}`}.`);
  return said.join("");
}

function searchTable(search) {
  const columns = [
    ...search.vary.map((name, place) => ({ label: name, get: (row) => row.point[place], number: typeof search.points[0][place] === "number" })),
    search.differences ? { label: "difference", get: (row) => row.difference, number: true } : null,
    search.scores ? { label: `score (${search.scorer}, %)`, get: (row) => row.score, number: true } : null,
    { label: "chosen", get: (row) => (row.chosen ? "chosen" : ""), show: (row) => (row.chosen ? tag("chosen", "chosen") : null) },
  ].filter(Boolean);
  if ("sampler" in search) columns.unshift({ label: "trial", get: (row) => row.trial, number: true });
  return table(search.rows, columns, { caption: `Values of ${search.label}`, filter: search.rows.length > 30 });
}

// --- scores

function scoresSection(scores) {
  const columns = [
    { label: "model", kind: "wide", get: (place) => scores.models[place].name, show: (place) => [scores.models[place].name, scores.models[place].name === scores.template ? el("span", { class: "soft" }, scores.assumed ? " (first)" : " (template)") : null] },
    ...scores.columns.map((column, which) => ({
      label: column.unit === "%" ? column.name : `${column.name} (points)`, number: true,
      title: column.questions === null ? "average" : plural(column.questions, "question"),
      get: (place) => scores.scores[place][which],
    })),
  ];
  const gains = [
    { label: "model", get: (gain) => gain.model, kind: "wide" },
    { label: "task", get: (gain) => gain.column },
    { label: "over", get: (gain) => gain.over.join(", "), kind: "wide" },
    { label: "gain", get: (gain) => gain.gain, number: true },
    { label: "low", get: (gain) => gain.low, number: true },
    { label: "high", get: (gain) => gain.high, number: true },
    { label: "verdict", kind: "wide", get: (gain) => (gain.low === null ? gain.reason || "no interval" : gain.low > 0 ? "better" : gain.high < 0 ? "worse" : "within the noise") },
  ];
  const over = scores.assumed ? `None of the models is known as the template, so gains are over the first, ${scores.template}.` : null;
  return section("scores", "Scores", null, over ? soft(over) : null,
    table(scores.models.map((_, place) => place), columns, { caption: "Scores", filter: false }),
    charts(scores.charts),
    scores.gains.length ? [el("h4", {}, "Gains"), soft(`Intervals hold ${scores.level} % of ${plural(scores.resamples, "paired resample")} of the questions.`), table(scores.gains, gains, { caption: "Gains" })] : null,
    notes(scores.notes));
}
