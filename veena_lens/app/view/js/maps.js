// What is shown, as numbers: maps over positions, shares over layers and heads, and who looks at a cell.

import { DECODE, DECODE_SIGNED, MEAN } from "./data.js";
import { number, percent, shown } from "./elements.js";

export function eachMap(view, bundle, visit) {
  // Calls visit(layer, head, offset of the map, its text and image scale) for the chosen layers and heads.
  const { layers } = view.header;
  const { layer, head } = view.state;
  const heads = bundle.heads;
  for (let l = layer === MEAN ? 0 : layer; l < (layer === MEAN ? layers : layer + 1); l++) {
    const one = head !== MEAN && heads > 1;
    for (let h = one ? head : 0; h < (one ? head + 1 : heads); h++) {
      const i = l * heads + h;
      visit(l, h, i * view.n, bundle.scales[2 * i], bundle.scales[2 * i + 1]);
    }
  }
}

export function sinkMass(view, bundle, l, offset, text, image) {
  let mass = 0;
  for (const p of view.header.sinks?.[l] ?? []) {
    mass += DECODE[bundle.maps[offset + p]] * (view.isImage[p] ? image : text);
  }
  return mass;
}

export function meanMap(view, bundle, withoutSinks) {
  const out = new Float32Array(view.n);
  const { maps } = bundle;
  const table = bundle.signed ? DECODE_SIGNED : DECODE;
  let count = 0;
  eachMap(view, bundle, (l, h, offset, text, image) => {
    let factor = 1;
    if (withoutSinks) {
      const left = 1 - sinkMass(view, bundle, l, offset, text, image);
      factor = left > 1e-6 ? 1 / left : 0;
    }
    text *= factor; image *= factor;
    for (let p = 0; p < view.n; p++) out[p] += table[maps[offset + p]] * (view.isImage[p] ? image : text);
    if (withoutSinks) {
      for (const p of view.header.sinks?.[l] ?? []) {
        out[p] -= table[maps[offset + p]] * (view.isImage[p] ? image : text);
      }
    }
    count++;
  });
  for (let p = 0; p < view.n; p++) out[p] /= count;
  if (withoutSinks && view.state.layer !== MEAN) {
    for (const p of view.header.sinks?.[view.state.layer] ?? []) out[p] = NaN; // a sink has no colour
  }
  return out;
}

export function shares(view, bundle, mode, position = null) {
  // For every layer and head: what goes to the images, or to one position.
  const name = `${mode}|${position}`;
  if (bundle.shares.has(name)) return bundle.shares.get(name);
  const { layers } = view.header;
  const { heads, maps, scales } = bundle;
  const table = bundle.signed ? DECODE_SIGNED : DECODE;
  const out = new Float32Array(layers * heads);
  for (let i = 0; i < layers * heads; i++) {
    const l = Math.floor(i / heads), offset = i * view.n, text = scales[2 * i], image = scales[2 * i + 1];
    const sinks = mode === "sinks" ? view.header.sinks?.[l] ?? [] : [];
    let total = 0;
    if (position !== null) {
      total = sinks.includes(position) ? 0 : table[maps[offset + position]] * (view.isImage[position] ? image : text);
    } else {
      for (let p = 0; p < view.n; p++) if (view.isImage[p]) total += table[maps[offset + p]];
      for (const p of sinks) if (view.isImage[p]) total -= table[maps[offset + p]];
      total *= image;
    }
    if (sinks.length) total /= Math.max(1e-6, 1 - sinkMass(view, bundle, l, offset, text, image));
    out[i] = total;
  }
  if (bundle.shares.size > 12) bundle.shares.clear();
  bundle.shares.set(name, out);
  return out;
}

export function layerMap(view, array, start, decode) {
  // The chosen layer of a [layer, pos] part of an array, or the mean over layers.
  const { layers } = view.header;
  const { layer } = view.state;
  const out = new Float32Array(view.n);
  const chosen = layer === MEAN ? [...Array(layers).keys()] : [layer];
  for (const l of chosen) for (let p = 0; p < view.n; p++) out[p] += decode(l, p, array[start + l * view.n + p]);
  return chosen.length > 1 ? out.map((v) => v / chosen.length) : out;
}

export function lensMap(view, word) {
  const { layers } = view.header;
  const maps = view.arrays.lens_maps, scales = view.arrays.lens_scales;
  return layerMap(view, maps, word * layers * view.n,
    (l, p, byte) => DECODE[byte] * scales[2 * (word * layers + l) + view.isImage[p]]);
}

export function currentMap(view) {
  // Values over all positions, their meaning, and the scale's ends.
  const { mode, word } = view.state;
  if (mode === "effects") {
    const { name } = view.header.effects;
    return { values: layerMap(view, view.arrays.effects, 0, (l, p, v) => v), name, show: number, signed: true };
  }
  if (mode === "norms") {
    const values = layerMap(view, view.arrays.norms, 0, (l, p, v) => Math.log10(Math.max(v, 1e-9)));
    return { values, name: "norm of the residual stream", show: (v) => number(10 ** v), low: null };
  }
  if (mode === "lens") {
    if (!view.header.lens.words.length) return null;
    const name = `probability of “${shown(view.header.lens.words[word]).trim()}” (%)`;
    return { values: lensMap(view, word), name, show: percent, low: 0 };
  }
  const bundle = view.bundleOf(view.query);
  if (!bundle) return null;
  if (mode === "difference") {
    const second = view.bundleOf(view.query, 1);
    if (!second) return null;
    const values = meanMap(view, bundle, false), theirs = meanMap(view, second, false);
    for (let p = 0; p < view.n; p++) values[p] -= theirs[p];
    return { values, name: "attention, first image minus second (% of the word’s)", show: percent, signed: true, bundle, second };
  }
  if (mode === "push") {
    const name = `projection on “${view.header.directions[view.state.direction]}”`;
    return { values: meanMap(view, bundle, false), name, show: number, signed: true, bundle };
  }
  const name = mode === "sinks" ? "attention without sinks (% of the rest)" : "attention (% of the word’s)";
  return { values: meanMap(view, bundle, mode === "sinks"), name, show: percent, low: 0, bundle };
}

export function lookers(view, position) {
  // How much each token of text looks at a position, as far as its maps are here.
  const out = new Map();
  const { mode } = view.state;
  if (!["attention", "sinks", "difference"].includes(mode)) return out;
  for (const at of view.chips.keys()) {
    const query = view.queryOf(at);
    if (query < position || view.chips.get(at).hidden) continue;
    const bundle = view.store.get({ query });
    if (!bundle) continue;
    let total = 0, count = 0;
    const table = DECODE;
    eachMap(view, bundle, (l, h, offset, text, image) => {
      const isSink = mode === "sinks" && (view.header.sinks?.[l] ?? []).includes(position);
      total += isSink ? 0 : table[bundle.maps[offset + position]] * (view.isImage[position] ? image : text);
      count++;
    });
    out.set(at, total / count);
  }
  return out;
}

export function gridValues(view) {
  // [rows][columns] of numbers with their names: layers by heads, or by words at one position.
  const { layers } = view.header;
  const { mode } = view.state;
  if (mode === "norms" || mode === "effects") {
    const at = view.patch ?? view.query;
    const values = Float32Array.from({ length: layers }, (_, l) => view.arrays[mode][l * view.n + at]);
    const name = mode === "norms" ? "norm of the residual stream" : view.header.effects.name;
    return { values, columns: 1, name: `${name}, here`, show: number, column: () => "", labels: [""] };
  }
  if (mode === "lens") {
    const at = view.patch ?? view.query, { words } = view.header.lens, columns = words.length;
    if (!columns) return null;
    const values = new Float32Array(layers * columns);
    for (let w = 0; w < columns; w++) for (let l = 0; l < layers; l++) {
      const i = w * layers + l;
      values[l * columns + w] = DECODE[view.arrays.lens_maps[i * view.n + at]]
        * view.arrays.lens_scales[2 * i + view.isImage[at]];
    }
    return { values, columns, name: "probability here (%)", show: percent,
      column: (w) => `“${shown(words[w]).trim()}”`, labels: words.map((w) => shown(w).trim()) };
  }
  const bundle = view.bundleOf(view.query);
  if (!bundle) return null;
  const position = view.patch;
  let values = shares(view, bundle, mode, position);
  if (mode === "difference") {
    const second = view.bundleOf(view.query, 1);
    if (!second || second.heads !== bundle.heads) return null;
    const theirs = shares(view, second, mode, position);
    values = values.map((v, i) => v - theirs[i]);
  }
  const place = position === null ? (view.isSigned ? "from all cells" : "to the image") : "at this cell";
  const what = { push: "projection", difference: "difference" }[mode] ?? "attention";
  const show = mode === "push" ? number : percent;
  const unit = mode === "push" ? "" : " (% of the word’s)", one = bundle.heads === 1;
  return { values, columns: bundle.heads, name: `${what} ${place}${unit}`, show, column: (h) => `head ${h}`,
    labels: one ? ["mean"] : [...Array(bundle.heads).keys()] };
}

export function ends(values, positions) {
  // The ends of a colour scale over some positions.
  let low = Infinity, high = -Infinity;
  for (const p of positions) { const v = values[p]; if (v < low) low = v; if (v > high) high = v; }
  return Number.isFinite(low) ? [low, high] : [0, 0];
}
