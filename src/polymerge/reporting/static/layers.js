// Sections of what single layers do.

// --- knockouts and ablations

function knockoutsSection(knockouts) {
  const many = knockouts.length > 1;
  return section("knockout", "Knockouts",
    "What each layer contributes: its weights are replaced, the model is scored, the weights are put back.",
    knockouts.map((one) => run(one, many,
      soft(`${one.model}${one.against ? `, and the same done to ${one.against}` : ""}. Replaced by ${one.replace}, scored by ${one.scorer}; ${plural(one.depth, "layer")}.`),
      intact(one), charts(one.charts), thirds(one))));
}

function intact(knockout) {
  const who = { model: "the model intact", against: "the original intact" };
  const columns = [
    { label: "task", get: (task) => task, kind: "wide" },
    { label: "prompts", get: (task) => knockout.prompts[task], number: true },
    ...Object.keys(knockout.baseline).map((one) => ({ label: who[one], get: (task) => knockout.baseline[one][task], number: true })),
  ];
  return table(Object.keys(knockout.prompts), columns, { caption: `Intact scores of ${knockout.label}`, filter: false });
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
