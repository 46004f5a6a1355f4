// What each section of the page shows.

const tag = (text, kind) => el("span", { class: `tag ${kind || ""}` }, text);
const mono = (text) => el("span", { class: "mono" }, text);
const soft = (...children) => el("p", { class: "soft" }, children);
const notes = (texts) => (texts.length ? el("ul", { class: "notes" }, texts.map((text) => el("li", {}, text))) : null);

function run(entry, many, ...children) {
  return el("div", { class: "run" }, many ? el("h3", {}, entry.label) : null, children);
}

function section(id, title, lead, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), lead ? el("p", { class: "lead" }, lead) : null, children);
}

function facts(entries) {
  return el("dl", { class: "facts" }, entries.filter(Boolean).map(([name, value, note]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, value), note ? el("dd", { class: "note" }, note) : null)));
}

function glance(data) {
  const found = [];
  const [merge, search, overlap] = [data.merges[0], data.searches[0], data.overlaps[0]];
  if (merge) {
    const done = merge.counts.merged || 0;
    found.push(["Method", merge.method, `${plural(merge.inputs.length, "input")}, seed ${merge.seed}`]);
    found.push([`Merged ${merge.counted}`, `${number(done)} of ${number(merge.total)}`, merge.parameters === null ? null : `${number(merge.parameters)} parameters`]);
  }
  if (overlap) {
    const total = overlap.totals[0];
    found.push(["Mass that cancels", number(total.conflict_mass, 3), `cosine ${number(total.cosine, 3)}`]);
  }
  if (search) {
    const [name] = search.vary;
    found.push([search.vary.length > 1 ? "Chosen" : `Chosen ${name}`, point(search.chosen), `by ${search.chosen_by}${search.prompts ? `, ${plural(search.prompts, "prompt")}` : ""}`]);
  }
  if (data.scores) {
    const gain = data.scores.gains.find((one) => data.scores.columns.some((column) => column.average && column.name === one.column)) || data.scores.gains[0];
    if (gain) found.push([`Gain on ${gain.column}`, number(gain.gain, 3), gain.low === null ? `${gain.model} over ${gain.over.join(", ")}` : `${number(gain.low, 3)} to ${number(gain.high, 3)}; ${gain.model}`]);
  }
  return found.length > 1 ? facts(found) : null;
}

// --- merges

function mergesSection(merges) {
  const many = merges.length > 1;
  return section("merges", "Recipe and inputs", null, merges.map((merge) => run(merge, many,
    el("div", { class: "pair" },
      el("div", {}, el("h4", {}, "Recipe"), el("pre", { tabindex: "0", "aria-label": "Recipe" }, merge.recipe)),
      el("div", {}, el("h4", {}, "Inputs"), el("ul", { class: "inputs" }, merge.inputs.map(inputItem)))),
    outcome(merge), charts(merge.charts))));
}

function inputItem(entry) {
  const digests = entry.files.length ? el("details", {},
    el("summary", {}, `digests of ${plural(entry.files.length, "file")}`),
    entry.files.map((file) => el("div", {}, el("span", { class: "soft" }, `${file.name.split("/").pop()} (${file.sha256 ? "sha256" : "samples"})`), mono(file.sha256 || file.sampled)))) : null;
  return el("li", {},
    el("div", { class: "who" }, el("strong", {}, entry.label), entry.roles.map((role) => tag(role)), el("span", { class: "soft" }, entry.family)),
    mono(entry.pinned && entry.pinned !== entry.source ? `${entry.source} (${entry.pinned})` : entry.source), digests);
}

function outcome(merge) {
  const counts = Object.entries(merge.counts).map(([fate, count]) => `${number(count)} ${fate}`).join(", ");
  const rows = [
    ["Output", `${number(merge.total)} ${merge.counted}: ${counts}; ${bytes(merge.bytes)} in ${plural(merge.files.length, "file")}`],
    ["Plan", mono(merge.plan_hash)],
    ["Command", mono(merge.command)],
    ["Made", `${date(merge.created)} by polymerge ${merge.polymerge}; ${Object.entries(merge.versions).map(([name, version]) => `${name} ${version}`).join(", ")}`],
  ];
  if (merge.relative_error && merge.relative_error.most !== null) {
    rows.push(["Rank", `${merge.ranks.join(", ")}; of no module more than ${number(merge.relative_error.most, 3)} of its norm has no room`]);
  }
  return el("div", { class: "table about-run" }, el("table", {}, el("tbody", {}, rows.map(([name, value]) =>
    el("tr", {}, el("th", { scope: "row", class: "soft" }, name), el("td", { class: "wide" }, value))))));
}

const date = (text) => {
  const found = new Date(text);
  return Number.isNaN(found.getTime()) ? text : found.toLocaleDateString("en-GB", { day: "numeric", month: "long", year: "numeric", timeZone: "UTC" });
};

// --- the plan

function planSection(merges) {
  const many = merges.length > 1;
  return section("plan", "The plan", "What became of every tensor. Sort by a column's head, filter by words.", merges.map((merge) =>
    run(merge, many, merge.plan ? planOf(merge) : soft("This record was written without its plan. Merge again to see it."))));
}

function planOf(merge) {
  const plan = merge.plan;
  const fates = { label: "fates", get: (row) => row[2] };
  const columns = [
    { label: "tensor", kind: "name", get: (row) => row[0], show: (row) => [mono(row[0]), row[1] && row[1] !== row[0] ? el("span", { class: "under mono" }, row[1]) : null] },
    { label: "fate", get: (row) => row[2], show: (row) => tag(row[2], row[2]) },
    { label: "shape", get: (row) => row[4].reduce((one, other) => one * other, 1), show: (row) => row[4].join(" \u00d7 ") || "scalar", number: true, title: "sorted by entries" },
    { label: "dtype", get: (row) => row[3] },
    { label: "setting", get: (row) => row[5].join(","), show: (row) => row[5].map((place) => `[${place}]`).join(" ") },
    { label: "why", kind: "why", get: (row) => plan.reasons[row[6]] },
  ];
  if (plan.by_kind) columns.splice(2, 0, { label: "tensors", get: (row) => row[7], number: true });
  const left = [
    { label: "input", get: (row) => row[0] },
    { label: "tensor", kind: "name", get: (row) => row[1], show: (row) => mono(row[1]) },
    { label: "why", kind: "why", get: (row) => plan.reasons[row[2]] },
  ];
  return [
    plan.settings.map((setting, place) => el("p", {}, el("span", { class: "soft" }, `[${place}] `), setting.words, el("span", { class: "soft" }, ` for ${plural(setting.rows, merge.counted.replace(/s$/, ""))}`))),
    notes(plan.warnings),
    plan.by_kind ? soft("The plan is too long for one page: tensors whose names differ in numbers alone are one row.") : null,
    table(plan.rows, columns, { caption: `Plan of ${merge.label}`, choose: fates, cards: true, filter: true,
      words: (row) => [row[0], row[1], row[2], row[3], row[4].join("x"), row[5].map((place) => `[${place}]`).join(""), plan.reasons[row[6]]].join(" ") }),
    plan.left_out.length ? [
      el("h4", {}, "Left out of the inputs"),
      el("ul", { class: "notes" }, plan.left_out_by_reason.map((one) => el("li", {}, `${plural(one.tensors, "tensor")} of ${one.input}: ${one.reason}`))),
      table(plan.left_out, left, { caption: `Left out of ${merge.label}`, cards: true }),
    ] : null,
  ];
}

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
  if (search.tasks) said.push(`; of the Pareto front of ${plural(search.points.length, "tried value")}${search.quick ? `, found on ${search.quick} prompts of each task and scored on all` : ""}`);
  if (search.prompts) said.push(`. ${plural(search.prompts, "prompt")}${search.seed === null ? "" : `, drawn with seed ${search.seed}`}.`);
  return said.join("");
}

function searchTable(search) {
  const columns = [
    ...search.vary.map((name, place) => ({ label: name, get: (row) => row.point[place], number: typeof search.points[0][place] === "number" })),
    search.differences ? { label: "difference", get: (row) => row.difference, number: true } : null,
    ...Object.entries(search.tasks || {}).map(([name, scorer], place) => ({ label: `${name} (${scorer}, %)`, get: (row) => row.scores[place], number: true })),
    search.scores ? { label: `score (${search.scorer}, %)`, get: (row) => row.score, number: true } : null,
    { label: "chosen", get: (row) => (row.chosen ? "chosen" : ""), show: (row) => (row.chosen ? tag("chosen", "chosen") : null) },
  ].filter(Boolean);
  if ("sampler" in search) columns.unshift({ label: "trial", get: (row) => row.trial, number: true });
  return table(search.rows, columns, { caption: `${search.tasks ? "Pareto front" : "Values"} of ${search.label}`, filter: search.rows.length > 30 });
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

// --- knockouts and ablations

function knockoutsSection(knockouts) {
  const many = knockouts.length > 1;
  return section("knockout", "Knockouts",
    "What each layer contributes: its weights are replaced, the model is scored, the weights are put back.",
    knockouts.map((one) => run(one, many,
      soft(`${one.model}${one.against ? `, and the same done to ${one.against}` : ""}. Replaced by ${one.replace}, scored by ${one.scorer}; ${plural(one.depth, "layer")}.`),
      unchanged(one), charts(one.charts), thirds(one))));
}

function unchanged(knockout) {
  const who = { model: "the model unchanged", against: "the original unchanged" };
  const columns = [
    { label: "task", get: (task) => task, kind: "wide" },
    { label: "prompts", get: (task) => knockout.prompts[task], number: true },
    ...Object.keys(knockout.baseline).map((one) => ({ label: who[one], get: (task) => knockout.baseline[one][task], number: true })),
  ];
  return table(Object.keys(knockout.prompts), columns, { caption: `Scores without a knockout of ${knockout.label}`, filter: false });
}

const share = (part) => (part.share === null ? "-" : `${number(part.share, 2)}${part.low === null ? "" : ` (${number(part.low, 2)} to ${number(part.high, 2)})`}`);

function thirds(knockout) {
  const who = { model: "the model", against: "the original", difference: "model less original" };
  const columns = [
    { label: "task", get: (row) => row.task },
    { label: "module", get: (row) => row.module },
    { label: "of", get: (row) => who[row.who] },
    { label: "drop in all", get: (row) => row.drop, number: true },
    ...["early", "middle", "late"].map((third) => ({ label: third, get: (row) => row[third].share, show: (row) => share(row[third]), number: true })),
  ];
  return [el("h4", {}, "Where it is lost"), soft(`Share of the whole drop in each third of the layers, and the interval that holds ${knockout.level} % of the resamples.`),
    table(knockout.summary, columns, { caption: `Thirds of ${knockout.label}` })];
}

function ablationsSection(ablations) {
  const many = ablations.length > 1;
  return section("ablation", "Merging some layers only", "Only the layers of a range are merged, all else is the template's.", ablations.map((one) => {
    const tasks = Object.keys(one.baseline);
    const columns = [
      { label: "range", get: (row) => row.name },
      { label: "layers", get: (row) => row.layers },
      ...tasks.flatMap((task) => [
        { label: task, get: (row) => row.tasks[task].score, number: true },
        { label: "gain", get: (row) => row.tasks[task].gain, number: true },
        { label: "interval", get: (row) => row.tasks[task].low, show: (row) => (row.tasks[task].low === null ? "-" : `${number(row.tasks[task].low)} to ${number(row.tasks[task].high)}`), number: true },
      ]),
    ];
    return run(one, many,
      soft(`Template ${one.template}; ${tasks.map((task) => `${task} ${number(one.baseline[task])} (${plural(one.prompts[task], "prompt")})`).join(", ")}.`),
      charts(one.charts), table(one.rows, columns, { caption: `Ranges of ${one.label}`, filter: one.rows.length > 20 }));
  }));
}

// --- what to try next

function adviceSection(data) {
  const runs = new Set(data.sources.map((source) => source.label)).size;
  const items = data.advice.map((one) => el("li", {}, el("div", {},
    el("h3", {}, one.title), el("p", {}, one.text),
    el("div", { class: "rests" }, `${runs > 1 ? `${one.about}: ` : ""}${Object.entries(one.numbers).map(([name, value]) => `${name} ${number(value)}`).join(", ")}`))));
  return section("next", "What to try next", data.advice.length ? "Each of these rests on the numbers below it, and on nothing else." : null,
    data.advice.length ? el("ol", { class: "advice" }, items) : soft("Nothing in these numbers asks for another try."));
}
