// What the view says beside its images: names of places, the status line, the table under it.

import { keyOf, MEAN } from "./data.js";
import { element, headName, percent, shown } from "./elements.js";
import { cellName } from "./grid.js";
import { lookers } from "./maps.js";

export function nameOf(view, position) {
  if (position === view.end) return "the next word";
  const word = view.words.find((w) => w.at === position);
  if (word) return `“${shown(word.text).trim() || "␣"}”`;
  const panel = view.panels.find((p) => p.cells.includes(position));
  if (!panel) return `position ${position}`;
  const i = panel.cells.indexOf(position), [rows, columns] = panel.about.grid;
  const [l, t, r, b] = panel.boxes.subarray(4 * i, 4 * i + 4);
  const name = view.header.panels.filter((p) => p.run === 0).length > 1 ? ` of ${panel.about.name}` : "";
  return `cell ${Math.floor(((t + b) / 2) * rows) + 1}, ${Math.floor(((l + r) / 2) * columns) + 1}${name}`;
}

// Position 75 in words: what is read there, and for which word.
export function readAt(view, query) {
  if (["norms", "effects"].includes(view.state.mode)) return "";
  const word = view.wordOf(query), here = view.words.find((w) => w.at === query);
  if (word === query) return ` (read at its own position, ${query})`;
  return ` (read at position ${query}${here ? `, “${shown(here.text).trim() || "␣"}”` : ""}, which predicts it)`;
}

function toImages(view, panels) {
  let total = 0;
  const seen = new Set();
  for (const panel of panels) for (const p of panel.cells) seen.add(p);
  for (let p = 0; p < view.n; p++) {
    if ((panels.length ? seen.has(p) : view.isImage[p]) && !Number.isNaN(view.map.values[p])) total += view.map.values[p];
  }
  return total;
}

export function captionOf(view, panel, isPair) {
  const { about } = panel, which = isPair ? (about.run ? "second: " : "first: ") : "";
  const text = `${which}${about.name}, ${about.grid[0]} × ${about.grid[1]} cells`;
  if (!["attention", "sinks"].includes(view.state.mode) || !view.map) return text;
  return `${text}; it gets ${percent(toImages(view, [panel]))} of the attention`;
}

export function tell(view) {
  const { state, header } = view;
  const name = view.byHead ? headName(state.layer, state.head) : state.layer === MEAN ? "mean over layers" : `layer ${state.layer}`;
  const word = nameOf(view, view.wordOf(view.query)), shape = view.gridShape;
  let text = name;
  if (view.gridHover && shape) {
    const [row, column] = view.gridHover, value = shape.values[row * shape.columns + column];
    text = `${cellName(view, row, column)}: ${shape.show(value ?? 0)}`;
  } else if (view.patch !== null && view.map) {
    text += `: ${nameOf(view, view.patch)} ${view.map.show(view.map.values[view.patch])}`;
    if (view.map.bundle) text += ` from ${word}${readAt(view, view.query)}`;
  } else if (view.map?.bundle) {
    const verb = { push: "reads from the image", difference: "gives the first image more by" }[state.mode] ?? "gives the image";
    text += `: ${word} ${verb} ${view.map.show(toImages(view, []))}${readAt(view, view.query)}`;
  }
  else if (view.map) text += `: ${word} ${view.map.show(view.map.values[view.query])}${readAt(view, view.query)}`;
  if (view.waiting.size) text += " · computing …";
  const note = view.map?.bundle && view.map.bundle.heads === 1 && header.heads > 1 && state.head !== MEAN
    && !view.host.fetch ? " (this file holds the mean over heads for this token)" : "";
  view.status.textContent = text + note;
  view.readout.replaceChildren(...details(view));
}

export function details(view) {
  const { state, header } = view;
  if (state.mode === "lens") {
    const at = view.patch ?? view.query;
    const { shape } = view.arrays.lens_ids, ranks = shape[2];
    const table = element("table", {}, element("caption", { text: `Most likely next tokens after ${nameOf(view, at)}, by layer` }));
    for (let l = 0; l < header.layers; l++) {
      const row = element("tr", {}, element("th", { scope: "row", text: String(l) }));
      for (let r = 0; r < Math.min(3, ranks); r++) {
        const i = (l * view.n + at) * ranks + r;
        const word = shown(header.lens.texts[view.arrays.lens_ids[i]]).trim() || "␣";
        row.append(element("td", {}, element("span", { text: word }),
          element("small", { text: ` ${Math.round(view.arrays.lens_probs[i] / 2.55)} %` })));
      }
      if (l === state.layer) row.className = "vv-chosen";
      table.append(row);
    }
    return [table];
  }
  if (!view.map) return [];
  const looking = view.patch !== null && state.hoverQuery === null ? lookers(view, view.patch) : new Map();
  if (looking.size) {
    const rows = [...looking].sort((a, b) => b[1] - a[1]).slice(0, 5);
    const when = view.predicts ? ", when they are predicted" : "";
    return [listed(view, `Words that look at ${nameOf(view, view.patch)}${when}`, rows, percent)];
  }
  const order = [...view.panels.flatMap((p) => (p.about.run ? [] : [...p.cells]))]
    .filter((p) => !Number.isNaN(view.map.values[p]));
  const size = view.isSigned ? (p) => Math.abs(view.map.values[p]) : (p) => view.map.values[p];
  const best = [];
  for (const p of order) {
    if (best.length < 5 || size(p) > size(best[4])) {
      best.push(p);
      best.sort((a, b) => size(b) - size(a));
      best.length = Math.min(5, best.length);
    }
  }
  if (!best.length) return [];
  return [listed(view, "Strongest cells", best.map((p) => [p, view.map.values[p]]), view.map.show)];
}

export function listed(view, caption, rows, show) {
  const table = element("table", {}, element("caption", { text: caption }));
  for (const [p, value] of rows) {
    table.append(element("tr", {}, element("td", { text: nameOf(view, p) }),
      element("td", { class: "vv-number", text: show(value) })));
  }
  return table;
}

export function missing(view) {
  const name = keyOf({ kind: view.state.mode === "push" ? "push" : "attention",
    name: view.state.mode === "push" ? view.header.directions[view.state.direction] : "", query: view.query });
  if (view.failed.has(name)) return `not available: ${view.failed.get(name)}`;
  if (view.host.fetch) return "computing …";
  if (view.state.mode === "lens") return "no word is mapped; point at a cell to read it";
  return "the maps of this token are not in this file";
}
