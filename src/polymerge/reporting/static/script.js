// Put the page together.

const data = JSON.parse(document.getElementById("data").textContent);

function themes() {
  const root = document.documentElement;
  const kept = () => { try { return localStorage.getItem("polymerge-theme"); } catch { return null; } };
  const keep = (name) => { try { localStorage.setItem("polymerge-theme", name); } catch { /* a file may not keep anything */ } };
  const names = ["auto", "light", "dark"];
  const buttons = names.map((name) => el("button", { type: "button", click: () => { set(name); keep(name); drawAll(); } }, name[0].toUpperCase() + name.slice(1)));
  function set(name) {
    if (name === "auto") root.removeAttribute("data-theme");
    else root.setAttribute("data-theme", name);
    buttons.forEach((button, place) => button.setAttribute("aria-pressed", String(names[place] === name)));
  }
  set(names.includes(kept()) ? kept() : "auto");
  return el("div", { class: "themes", role: "group", "aria-label": "Theme" }, buttons);
}

const sections = [
  ["merges", "Recipe", data.merges.length ? mergesSection(data.merges) : null],
  ["plan", "Plan", data.merges.length ? planSection(data.merges) : null],
  ["overlap", "Overlap", data.overlaps.length ? overlapsSection(data.overlaps) : null],
  ["search", "Search", data.searches.length ? searchesSection(data.searches) : null],
  ["scores", "Scores", data.scores ? scoresSection(data.scores) : null],
  ["knockout", "Knockouts", data.knockouts.length ? knockoutsSection(data.knockouts) : null],
  ["ablation", "Layers", data.ablations.length ? ablationsSection(data.ablations) : null],
  ["next", "What to try next", adviceSection(data)],
].filter(([, , node]) => node);

document.getElementById("top").append(
  el("div", {}, el("p", { class: "kind" }, "polymerge report"), el("h1", {}, data.title),
    el("p", { class: "made" }, `Made ${date(data.created)} of ${plural(data.sources.length, "record")} by polymerge ${data.polymerge}`)),
  themes());
document.getElementById("sections").append(el("ul", {}, sections.map(([id, name]) => el("li", {}, el("a", { href: `#${id}` }, name)))));
document.getElementById("content").append(...[glance(data), ...sections.map(([, , node]) => node)].filter(Boolean));
document.getElementById("foot").append(el("details", {}, el("summary", {}, `What this page was made of (${plural(data.sources.length, "file")})`),
  el("ul", { class: "notes" }, data.sources.map((source) => el("li", {}, `${source.kind} ${source.label}: `, mono(source.file))))));
window.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
window.addEventListener("beforeprint", () => { hideTip(); printed.forEach((make) => make()); });
window.addEventListener("scroll", hideTip, { passive: true });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
