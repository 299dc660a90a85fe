// The parts of a view and where they stand: choices above, images and tokens on the left, the grid on the right.

import { MEAN } from "./data.js";
import { element, numbered, shown } from "./elements.js";
import { listenGrid } from "./grid.js";
import { buildPanel } from "./panels.js";
import { buildStrip } from "./strip.js";

const NAMES = {
  attention: "Attention", sinks: "Without sinks", difference: "Difference", lens: "Logit lens", push: "Projection",
  norms: "Norms", effects: "Effects of patching",
};

export function build(view) {
  const { header } = view;
  view.root.classList.add("veena-view");
  view.root.replaceChildren();
  const bar = element("div", { class: "vv-bar" });
  view.modes = element("div", { class: "vv-modes", role: "radiogroup", "aria-label": "What the maps show" });
  for (const mode of header.modes) {
    const button = element("button", { type: "button", role: "radio", "data-mode": mode, text: NAMES[mode] });
    button.addEventListener("click", () => view.pin({ mode }));
    view.modes.append(button);
  }
  view.modes.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault(); event.stopPropagation();
    const at = header.modes.indexOf(view.state.mode);
    const mode = header.modes[(at + step + header.modes.length) % header.modes.length];
    view.pin({ mode });
    view.modes.querySelector(`[data-mode="${mode}"]`).focus();
  });
  view.layerChoice = choice("Layer", [["mean", MEAN], ...numbered(header.layers)], (layer) => view.pin({ layer }));
  view.headChoice = choice("Head", [["mean", MEAN], ...numbered(header.heads)], (head) => view.pin({ head }));
  const words = (header.lens?.words ?? []).map((w, i) => [shown(w).trim() || "␣", i]);
  view.wordChoice = choice("Word", words, (word) => view.set({ word }));
  view.directionChoice = choice("Direction", header.directions.map((d, i) => [d, i]),
    (direction) => view.set({ direction }));
  const strength = element("input", { type: "range", min: 0, max: 100, value: view.state.strength * 100 });
  strength.addEventListener("input", () => view.set({ strength: strength.value / 100 }));
  const shared = element("input", { type: "checkbox" });
  shared.checked = view.state.shared;
  shared.addEventListener("change", () => view.set({ shared: shared.checked }));
  view.sharedBox = element("label", { class: "vv-field", title: "One colour scale for the maps of all layers and heads" },
    shared, "one scale");
  view.placeChoice = choice("A word shows", [["the position that predicts it", 1], ["its own position", 0]],
    (predicts) => view.set({ predicts: Boolean(predicts) }));
  bar.append(view.modes, view.layerChoice, view.headChoice, view.wordChoice, view.directionChoice, view.placeChoice,
    element("label", { class: "vv-field" }, "Map", strength), view.sharedBox);

  view.pictures = element("div", { class: "vv-pictures" });
  view.panels = header.panels.map((panel, i) => buildPanel(view, panel, i));
  if (!view.panels.length) view.pictures.append(element("p", { class: "vv-note", text: "This prompt has no image." }));
  view.legend = element("canvas", { class: "vv-legend", "aria-hidden": "true" });
  view.legendLow = element("span", { class: "vv-number" });
  view.legendHigh = element("span", { class: "vv-number" });
  view.legendName = element("span");
  const legend = element("div", { class: "vv-legendrow" }, view.legendLow, view.legend, view.legendHigh, view.legendName);
  view.strip = buildStrip(view);
  const hint = element("p", { class: "vv-note", text: "Point at a word to see where it looks, at a cell to see which words "
    + "look at it. Click or Enter pins, Escape releases. J, K: layers; H, L: heads; M: mean." });
  const told = Object.entries(header.about ?? {}).filter(([, value]) => value !== "" && value !== null);
  const about = element("p", { class: "vv-note vv-about", text: told.map(([name, value]) => `${name}: ${value}`).join(" · ") });
  about.hidden = !told.length;
  const left = element("div", { class: "vv-left" }, view.pictures, legend, view.strip, hint, about);

  view.grid = element("canvas", { class: "vv-grid", tabindex: "0", role: "img" });
  view.gridCorner = element("span", { class: "vv-corner" });
  view.gridRows = element("div", { class: "vv-rows" });
  view.gridColumns = element("div", { class: "vv-columns" });
  view.gridBox = element("div", { class: "vv-gridbox" }, view.gridCorner, view.gridColumns, view.gridRows, view.grid);
  view.gridName = element("h3", { class: "vv-head" });
  view.gridLow = element("span", { class: "vv-number" });
  view.gridHigh = element("span", { class: "vv-number" });
  view.gridLegend = element("canvas", { class: "vv-legend", "aria-hidden": "true" });
  view.readout = element("div", { class: "vv-readout" });
  view.status = element("p", { class: "vv-status", role: "status", "aria-live": "polite" });
  const right = element("div", { class: "vv-right" }, view.gridName, view.gridBox,
    element("div", { class: "vv-legendrow" }, view.gridLow, view.gridLegend, view.gridHigh), view.status, view.readout);
  listenGrid(view);
  view.root.append(bar, element("div", { class: "vv-body" }, left, right));
  view.keys = (event) => view.key(event);
  view.root.addEventListener("keydown", view.keys);
}

function choice(label, options, chosen) {
  const select = element("select", { "aria-label": label });
  for (const [text, value] of options) select.append(element("option", { value, text }));
  select.addEventListener("change", () => chosen(Number(select.value)));
  const field = element("label", { class: "vv-field" }, label, select);
  field.select = select;
  return field;
}
