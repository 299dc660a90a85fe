// An image with its cells: pointing, pinning, keys, and the colours on it.

import { sized } from "./canvas.js";
import { element } from "./elements.js";

export function buildPanel(view, about, number) {
  const canvas = element("canvas", { tabindex: "0", role: "img" });
  const figure = element("figure", { class: "vv-picture" }, canvas);
  figure.append(element("figcaption"));
  view.pictures.append(figure);
  const panel = { about, canvas, figure, boxes: view.arrays[about.boxes], cells: view.arrays[about.cells], image: null };
  panel.figure.style.setProperty("--ratio", about.width / about.height);
  if (about.source) {
    const image = new Image();
    image.onload = () => { panel.image = image; view.draw(); };
    image.src = about.source;
  }
  const cellOf = (event) => {
    const box = canvas.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    for (let i = 0; i < panel.cells.length; i++) {
      const [l, t, r, b] = panel.boxes.subarray(4 * i, 4 * i + 4);
      if (x >= l && x < r && y >= t && y < b) return i;
    }
    return null;
  };
  canvas.addEventListener("pointermove", (event) => {
    const cell = cellOf(event);
    view.hover({ hoverPatch: cell === null ? null : panel.cells[cell] });
  });
  canvas.addEventListener("pointerleave", () => view.hover({ hoverPatch: null }));
  canvas.addEventListener("click", (event) => {
    const cell = cellOf(event);
    if (cell === null) return;
    view.pin({ patch: view.state.patch === panel.cells[cell] ? null : panel.cells[cell] });
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    const now = panel.cells.indexOf(view.state.patch);
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (now < 0 && panel.cells.length) view.pin({ patch: panel.cells[middle(panel)] });
    }
    if (!step) return;
    event.preventDefault(); event.stopPropagation();
    const from = now < 0 ? middle(panel) : now;
    view.pin({ patch: panel.cells[now < 0 ? from : neighbour(panel, from, step)], hoverPatch: null });
  });
  panel.number = number;
  return panel;
}

export function middle(panel) { return nearest(panel, 0.5, 0.5); }

export function nearest(panel, x, y) {
  let best = 0, least = Infinity;
  for (let i = 0; i < panel.cells.length; i++) {
    const [l, t, r, b] = panel.boxes.subarray(4 * i, 4 * i + 4);
    const far = ((l + r) / 2 - x) ** 2 + ((t + b) / 2 - y) ** 2;
    if (r > l && b > t && far < least) { least = far; best = i; }
  }
  return best;
}

export function neighbour(panel, from, [dx, dy]) {
  const [l, t, r, b] = panel.boxes.subarray(4 * from, 4 * from + 4);
  return nearest(panel, (l + r) / 2 + dx * (r - l), (t + b) / 2 + dy * (b - t));
}

export function drawPanel(view, panel, [low, high]) {
  const place = sized(panel.canvas, panel.about.width / panel.about.height);
  if (!place) return;
  const { context, w, h, scale } = place;
  context.globalAlpha = 1;
  context.fillStyle = "#eceef1";
  context.fillRect(0, 0, w, h);
  if (panel.image) {
    context.imageSmoothingEnabled = panel.about.width > 96;
    context.drawImage(panel.image, 0, 0, w, h);
  }
  const cells = panel.cells, boxes = panel.boxes;
  if (view.map) {
    const { values, signed } = view.map;
    const colours = view.header.colours[signed ? "signed" : "picture"];
    const strength = view.state.strength;
    for (let i = 0; i < cells.length; i++) {
      const value = values[cells[i]];
      if (Number.isNaN(value)) continue;
      const share = high > low ? Math.min(1, Math.max(0, (value - low) / (high - low))) : signed ? 0.5 : 0;
      // Strong cells hide more of the image than weak ones, so that the face stays where nobody looks.
      const weight = signed ? Math.abs(share - 0.5) * 2 : share;
      context.globalAlpha = strength * (signed ? 0.1 + 0.9 * weight : 0.25 + 0.7 * weight);
      context.fillStyle = colours[Math.round(share * 255)];
      const x = Math.round(boxes[4 * i] * w), y = Math.round(boxes[4 * i + 1] * h);
      context.fillRect(x, y, Math.round(boxes[4 * i + 2] * w) - x, Math.round(boxes[4 * i + 3] * h) - y);
    }
  }
  context.globalAlpha = 1;
  const mark = (position, inner, width) => {
    const i = cells.indexOf(position);
    if (position === null || i < 0) return;
    const x = boxes[4 * i] * w, y = boxes[4 * i + 1] * h;
    const size = [boxes[4 * i + 2] * w - x, boxes[4 * i + 3] * h - y];
    context.lineWidth = (width + 2) * scale; context.strokeStyle = "#000000"; context.strokeRect(x, y, ...size);
    context.lineWidth = width * scale; context.strokeStyle = inner; context.strokeRect(x, y, ...size);
  };
  mark(view.state.patch, "#56B4E9", 3);
  if (view.state.hoverPatch !== view.state.patch) mark(view.state.hoverPatch, "#ffffff", 2);
  const grid = panel.about.grid;
  const label = `${panel.about.name}, ${grid[0]} by ${grid[1]} cells; arrow keys choose a cell`;
  panel.canvas.setAttribute("aria-label", label);
}
