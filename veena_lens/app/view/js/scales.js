// The ends of the colour scale over the images: one for the maps of all layers and heads, or the map's own.

import { DECODE, DECODE_SIGNED, MEAN } from "./data.js";
import { ends, sinkMass } from "./maps.js";

function meanPeak(view, bundle, second) {
  // The strongest cell of an image in the mean over heads of any layer, with a second run in the difference of both.
  const name = `peak|${view.state.mode}`;
  if (bundle.shares.has(name)) return bundle.shares.get(name);
  const { layers } = view.header, isSinks = view.state.mode === "sinks";
  const places = [];
  for (let p = 0; p < view.n; p++) if (view.isImage[p]) places.push(p);
  const sum = new Float32Array(places.length);
  let most = 0;
  for (let l = 0; l < layers; l++) {
    sum.fill(0);
    const sinks = isSinks ? view.header.sinks?.[l] ?? [] : [];
    for (const [run, sign] of [[bundle, 1], [second, -1]]) {
      if (!run) continue;
      const table = run.signed ? DECODE_SIGNED : DECODE;
      for (let h = 0; h < run.heads; h++) {
        const i = l * run.heads + h, offset = i * view.n;
        let scale = (sign * run.scales[2 * i + 1]) / run.heads;
        if (sinks.length) scale /= Math.max(1e-6, 1 - sinkMass(view, run, l, offset, run.scales[2 * i], run.scales[2 * i + 1]));
        for (let j = 0; j < places.length; j++) sum[j] += scale * table[run.maps[offset + places[j]]];
      }
    }
    for (let j = 0; j < places.length; j++) if (!sinks.includes(places[j])) most = Math.max(most, Math.abs(sum[j]));
  }
  bundle.shares.set(name, most);
  return most;
}

function sharedRange(view) {
  const { mode, head } = view.state, { bundle, second } = view.map;
  if (bundle) {
    if (head === MEAN || bundle.heads === 1) { const most = meanPeak(view, bundle, second); return [-most, most]; }
    let most = 0;
    for (const run of [bundle, second]) if (run) for (let i = 1; i < run.scales.length; i += 2) most = Math.max(most, run.scales[i]);
    return [-most, most];
  }
  view.ranges ??= new Map();
  if (view.ranges.has(mode)) return view.ranges.get(mode);
  let low = Infinity, high = -Infinity;
  if (mode === "lens") {
    low = 0; high = 0;
    for (let i = 1; i < view.arrays.lens_scales.length; i += 2) high = Math.max(high, view.arrays.lens_scales[i]);
  } else {
    const array = view.arrays[mode];
    for (let l = 0; l < view.header.layers; l++) for (let p = 0; p < view.n; p++) {
      if (!view.isImage[p] || Number.isNaN(array[l * view.n + p])) continue;
      const v = mode === "norms" ? Math.log10(Math.max(array[l * view.n + p], 1e-9)) : array[l * view.n + p];
      low = Math.min(low, v); high = Math.max(high, v);
    }
  }
  view.ranges.set(mode, [low, high]);
  return [low, high];
}

export function pictureRange(view) {
  if (!view.map) return [0, 0];
  const { values, signed } = view.map;
  let [low, high] = [Infinity, -Infinity];
  if (view.state.shared) [low, high] = sharedRange(view);
  else for (const panel of view.panels) {
    const [a, b] = ends(values, panel.cells);
    low = Math.min(low, a); high = Math.max(high, b);
  }
  if (!Number.isFinite(low)) [low, high] = [0, 0];
  if (signed) { const most = Math.max(Math.abs(low), Math.abs(high)); return [-most, most]; }
  return [view.map.low ?? low, high];
}

export function scaleName(view) {
  if (!view.state.shared) return "; the scale of this map";
  if (!view.byHead) return view.state.mode === "lens" ? "; one scale for all layers and words" : "; one scale for all layers";
  return view.state.head === MEAN ? "; one scale for the means of all layers" : "; one scale for all layers and heads";
}
