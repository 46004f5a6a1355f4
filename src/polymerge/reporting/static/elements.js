// Elements, numbers as people read them, and the tooltip. Text reaches the page through text nodes only.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(3)) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function number(value, digits = 4) {
  if (value === null || value === undefined) return "-";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en-GB");
  const size = Math.abs(value);
  if (size >= 1000) return value.toLocaleString("en-GB", { maximumFractionDigits: 1 });
  if (size < 1e-3) return value.toExponential(2);
  return String(Number(value.toPrecision(digits)));
}

const UNITS = [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]];

function bytes(value) {
  for (const [unit, size] of UNITS) {
    if (value >= size) return `${(value / size).toFixed(1)} ${unit}`;
  }
  return `${value} B`;
}

const plural = (count, word, many) => `${number(count)} ${count === 1 ? word : many || `${word}s`}`;
const point = (values) => values.map((value) => number(value)).join(", ");

const tip = document.getElementById("tip");
const aloud = document.getElementById("aloud");

function showTip(head, lines, x, y, say) {
  tip.replaceChildren(
    el("span", { class: "head" }, head),
    ...lines.map((line) => el("span", { class: "line" }, line)),
  );
  tip.hidden = false;
  const room = tip.getBoundingClientRect();
  const left = Math.min(Math.max(x + 14, 8), Math.max(8, window.innerWidth - room.width - 8));
  const above = y - room.height - 12;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : y + 18}px`;
  if (say) aloud.textContent = [head, ...lines].join("; ");
}

function hideTip() {
  tip.hidden = true;
}
