// The grid of layers by heads (or words): pointing, choosing, drawing.

import { drawLegend, sized } from "./canvas.js";
import { MEAN } from "./data.js";
import { element, headName } from "./elements.js";
import { ends } from "./maps.js";

export function listenGrid(view) {
  const cellOf = (event) => {
    const box = view.grid.getBoundingClientRect(), { columns } = view.gridShape ?? { columns: 1 };
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * view.header.layers);
    return [Math.min(view.header.layers - 1, Math.max(0, row)), Math.min(columns - 1, Math.max(0, column))];
  };
  view.grid.addEventListener("pointermove", (event) => { view.gridHover = cellOf(event); view.tell(); });
  view.grid.addEventListener("pointerleave", () => { view.gridHover = null; view.tell(); });
  view.grid.addEventListener("click", (event) => {
    const [layer, column] = cellOf(event);
    view.pin(gridStep(view, layer, column));
  });
  view.grid.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!step) return;
    event.preventDefault(); event.stopPropagation();
    view.move(...step);
  });
}

export function gridStep(view, layer, column) {
  const { mode } = view.state;
  if (mode === "norms" || mode === "effects") return { layer };
  if (mode === "lens") return { layer, word: column };
  return { layer, head: view.gridShape.columns === 1 && view.header.heads > 1 ? MEAN : column };
}

export function cellName(view, layer, column) {
  // A head, or a layer with its word.
  if (view.byHead) return headName(layer, view.gridShape.columns === 1 && view.header.heads > 1 ? MEAN : column);
  const where = layer === MEAN ? "mean over layers" : `layer ${layer}`;
  return column === MEAN || !view.gridShape.column(column) ? where : `${where}, ${view.gridShape.column(column)}`;
}

function numberGrid(view, shape) {
  // Numbers of layers beside the grid and of heads (or words) over it, as many as there is room for.
  const labels = shape?.labels ?? [], { layers } = view.header;
  const name = `${layers}|${labels.join("|")}`;
  if (view.gridNumbers === name) return;
  view.gridNumbers = name;
  const rows = Math.ceil(layers / 24), columns = Math.ceil(labels.length / 16);
  view.gridRows.replaceChildren(...[...Array(layers).keys()].map((l) => element("span", { text: l % rows ? "" : String(l) })));
  view.gridColumns.replaceChildren(...labels.map((c, i) => element("span", { text: i % columns ? "" : String(c), title: String(c) })));
  view.gridCorner.textContent = { lens: "layer \\ word", norms: "layer", effects: "layer" }[view.state.mode] ?? "layer \\ head";
}

export function drawGrid(view) {
  const shape = view.gridShape, { layers } = view.header;
  view.grid.style.height = `${Math.min(420, Math.max(120, layers * Math.min(28, 420 / layers)))}px`;
  const place = sized(view.grid);
  if (!place) return;
  const { context, w, h, scale } = place;
  context.fillStyle = "#eceef1";
  context.fillRect(0, 0, w, h);
  const { mode: now } = view.state;
  const across = now === "lens" ? " × words" : ["norms", "effects"].includes(now) ? "" : shape?.columns === 1 ? ", mean over heads" : " × heads";
  view.gridName.textContent = `Layers${across}${shape ? `: ${shape.name}` : ""}`;
  numberGrid(view, shape);
  if (!shape) { view.gridLow.textContent = view.gridHigh.textContent = ""; return; }
  const { values, columns } = shape;
  let [low, high] = ends(values, values.keys());
  if (view.isSigned) { high = Math.max(Math.abs(low), Math.abs(high)); low = -high; }
  else if (now !== "norms") low = 0;
  const colours = view.header.colours[view.isSigned ? "signed" : "cells"];
  const gap = w / columns > 8 * scale && h / layers > 8 * scale ? scale : 0;
  for (let i = 0; i < values.length; i++) {
    const row = Math.floor(i / columns), column = i % columns;
    const x = Math.round((column * w) / columns), y = Math.round((row * h) / layers);
    const share = high > low ? (values[i] - low) / (high - low) : view.isSigned ? 0.5 : 0;
    context.fillStyle = colours[Math.round(share * 255)];
    context.fillRect(x, y, Math.round(((column + 1) * w) / columns) - x - gap, Math.round(((row + 1) * h) / layers) - y - gap);
  }
  const { layer, head, word, mode } = view.state;
  const column = mode === "lens" ? word : columns === 1 ? MEAN : head;
  const left = column === MEAN ? 0 : (column * w) / columns, wide = column === MEAN ? w : w / columns;
  const top = layer === MEAN ? 0 : (layer * h) / layers, tall = layer === MEAN ? h : h / layers;
  for (const [colour, width] of [["#000000", 4], ["#ffffff", 2]]) {
    context.strokeStyle = colour; context.lineWidth = width * scale;
    context.strokeRect(left + scale, top + scale, wide - 2 * scale - gap, tall - 2 * scale - gap);
  }
  view.gridLow.textContent = shape.show(low);
  view.gridHigh.textContent = shape.show(high);
  drawLegend(view, view.gridLegend, view.isSigned ? "signed" : "cells");
  view.grid.setAttribute("aria-label",
    `${layers} layers by ${columns} columns, ${shape.name}; chosen: ${cellName(view, layer, column)}; arrow keys move`);
}
