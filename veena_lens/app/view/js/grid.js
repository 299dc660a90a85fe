// The grid of layers by heads (or words): pointing, choosing, drawing.

import { drawLegend, sized } from "./canvas.js";
import { MEAN } from "./data.js";
import { ends } from "./maps.js";

export function listenGrid(view) {
  const cellOf = (event) => {
    const box = view.grid.getBoundingClientRect(), { columns } = view.gridShape ?? { columns: 1 };
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * view.header.layers);
    return [Math.min(view.header.layers - 1, Math.max(0, row)), Math.min(columns - 1, Math.max(0, column))];
  };
  view.grid.addEventListener("pointermove", (event) => { view.gridHover = cellOf(event); tell(view); });
  view.grid.addEventListener("pointerleave", () => { view.gridHover = null; tell(view); });
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
  if (mode === "norms") return { layer };
  if (mode === "lens") return { layer, word: column };
  return { layer, head: view.gridShape.columns === 1 && view.header.heads > 1 ? MEAN : column };
}

export function drawGrid(view) {
  const shape = view.gridShape, { layers } = view.header;
  view.grid.style.height = `${Math.min(420, Math.max(120, layers * Math.min(28, 420 / layers)))}px`;
  const place = sized(view.grid);
  if (!place) return;
  const { context, w, h, scale } = place;
  context.fillStyle = "#eceef1";
  context.fillRect(0, 0, w, h);
  const across = view.state.mode === "lens" ? " × words" : view.state.mode === "norms" ? "" : shape?.columns === 1 ? ", mean over heads" : " × heads";
  view.gridName.textContent = `Layers${across}${shape ? `: ${shape.name}` : ""}`;
  if (!shape) { view.gridLow.textContent = view.gridHigh.textContent = ""; return; }
  const { values, columns } = shape;
  let [low, high] = ends(values, values.keys());
  if (view.isSigned) { high = Math.max(Math.abs(low), Math.abs(high)); low = -high; }
  else if (view.state.mode !== "norms") low = 0;
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
  const column = mode === "lens" ? word : mode === "norms" || columns === 1 ? MEAN : head;
  const left = column === MEAN ? 0 : (column * w) / columns, wide = column === MEAN ? w : w / columns;
  const top = layer === MEAN ? 0 : (layer * h) / layers, tall = layer === MEAN ? h : h / layers;
  for (const [colour, width] of [["#000000", 4], ["#ffffff", 2]]) {
    context.strokeStyle = colour; context.lineWidth = width * scale;
    context.strokeRect(left + scale, top + scale, wide - 2 * scale - gap, tall - 2 * scale - gap);
  }
  view.gridLow.textContent = shape.show(low);
  view.gridHigh.textContent = shape.show(high);
  drawLegend(view, view.gridLegend, view.isSigned ? "signed" : "cells");
  const what = layer === MEAN ? "mean over layers" : `layer ${layer}`;
  const where = column === MEAN ? "" : `, ${shape.column(column)}`;
  view.grid.setAttribute("aria-label",
    `${layers} layers by ${columns} columns, ${shape.name}; chosen: ${what}${where}; arrow keys move`);
}
