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
    el("summary", {}, `sha256 of ${plural(entry.files.length, "file")}`),
    entry.files.map((file) => el("div", {}, el("span", { class: "soft" }, file.name.split("/").pop()), mono(file.sha256)))) : null;
  return el("li", {},
    el("div", { class: "who" }, el("strong", {}, entry.label), entry.roles.map((role) => tag(role)), el("span", { class: "soft" }, entry.family)),
    mono(entry.source === entry.path ? entry.path : `${entry.source} (${entry.path})`),
    entry.adapter ? mono(`adapter ${entry.adapter}`) : null, digests);
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

// --- what to try next

function adviceSection(data) {
  const runs = new Set(data.sources.map((source) => source.label)).size;
  const items = data.advice.map((one) => el("li", {}, el("div", {},
    el("h3", {}, one.title), el("p", {}, one.text),
    el("div", { class: "rests" }, `${runs > 1 ? `${one.about}: ` : ""}${Object.entries(one.numbers).map(([name, value]) => `${name} ${number(value)}`).join(", ")}`))));
  return section("next", "What to try next", data.advice.length ? "Each of these rests on the numbers below it, and on nothing else." : null,
    data.advice.length ? el("ol", { class: "advice" }, items) : soft("Nothing in these numbers asks for another try."));
}
