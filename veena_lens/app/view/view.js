// One view of a run for three hosts: a page, a notebook widget, the explorer. No framework, nothing fetched by itself.
// openPage(element, base64) opens data that lie in a page; mount(element, buffer, host) is what every host calls;
// the default export is anywidget's. host: {fetch(key) -> Promise<ArrayBuffer>, pinned(state), open: {layer, head}}.

const DECODE = new Float32Array(256);
const DECODE_SIGNED = new Float32Array(256);
for (let i = 0; i < 256; i++) {
  DECODE[i] = (i / 255) ** 2;
  const w = (i - 128) / 127;
  DECODE_SIGNED[i] = w * Math.abs(w);
}
const MEAN = -1;
const KEPT_BYTES = 192 * 2 ** 20; // of maps that were asked for
const NAMES = {
  attention: "Attention", sinks: "Without sinks", difference: "Difference", lens: "Logit lens", push: "Push",
  norms: "Norms",
};
const TYPES = { uint8: Uint8Array, int32: Int32Array, float32: Float32Array };

// --- data -------------------------------------------------------------------------------------------------

export function unpack(buffer) {
  const bytes = new Uint8Array(buffer);
  if (String.fromCharCode(...bytes.subarray(0, 4)) !== "VEEN") throw new Error("these are no data of a view");
  const length = new DataView(buffer).getUint32(4, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const arrays = {};
  for (const [name, about] of Object.entries(header.arrays)) {
    const n = about.shape.reduce((a, b) => a * b, 1);
    arrays[name] = new TYPES[about.dtype](buffer, 8 + length + about.at, n);
    arrays[name].shape = about.shape;
  }
  return { header, arrays };
}

function keyOf({ kind = "attention", name = "", run = 0, query }) {
  return `${kind}|${name}|${run}|${query}`;
}

class Store {
  // Bundles by key; those that came later are dropped, oldest first, when they are too many.
  constructor() { this.bundles = new Map(); this.later = []; this.bytes = 0; }
  add(header, arrays, isLater) {
    for (const about of header.bundles) {
      const key = keyOf(about);
      const maps = arrays[about.maps];
      this.bundles.set(key, { ...about, maps, scales: arrays[about.scales], heads: maps.shape[1], shares: new Map() });
      if (!isLater) continue;
      this.later.push(key);
      this.bytes += maps.length;
      while (this.bytes > KEPT_BYTES && this.later.length > 1) {
        const old = this.later.shift();
        this.bytes -= this.bundles.get(old)?.maps.length ?? 0;
        this.bundles.delete(old);
      }
    }
  }
  get(key) { return this.bundles.get(keyOf(key)); }
}

// --- colours ----------------------------------------------------------------------------------------------

function parse(hexes) {
  return hexes.map((h) => [1, 3, 5].map((i) => parseInt(h.slice(i, i + 2), 16)));
}

function mixed(from, to, share) {
  return `rgb(${from.map((a, i) => Math.round(a + (to[i] - a) * share)).join(",")})`;
}

// Token backgrounds stay light, so that dark words on them keep a contrast above 4.5 : 1.
const WHITE = [255, 255, 255], ORANGE = [242, 166, 66], BLUE = [116, 184, 232];

// --- the view ---------------------------------------------------------------------------------------------

const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
};

const percent = (x) => (Math.abs(x) >= 0.0995 ? `${Math.round(x * 100)} %` : `${(x * 100).toPrecision(2)} %`);
const number = (x) => (x === 0 ? "0" : Math.abs(x) >= 100 ? x.toFixed(0) : x.toPrecision(3));
const shown = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥");

class View {
  constructor(root, buffer, host = {}) {
    this.root = root;
    this.host = host;
    const { header, arrays } = unpack(buffer);
    Object.assign(this, { header, arrays, store: new Store(), waiting: new Map(), failed: new Map() });
    this.store.add(header, arrays, false);
    this.n = header.positions;
    this.isImage = arrays.is_image;
    this.words = header.tokens.filter((t) => t.at !== undefined);
    this.palette = Object.fromEntries(Object.entries(header.colours).map(([k, v]) => [k, parse(v)]));
    this.state = {
      mode: header.modes[0] ?? "attention", layer: MEAN, head: MEAN, query: header.query, hoverQuery: null,
      patch: null, hoverPatch: null, word: 0, direction: 0, strength: 0.75, shared: false,
    };
    if (host.open) Object.assign(this.state, host.open);
    else this.state.layer = this.lookingLayer();
    this.build();
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.pictures);
    this.observer.observe(this.gridBox);
    this.update();
  }

  lookingLayer() {
    // The layer whose heads together give the pictures most.
    if (!this.byHead) return this.header.layers - 1;
    const bundle = this.store.get({ query: this.state.query });
    if (!bundle || !this.header.panels.length) return MEAN;
    const shares = this.shares(bundle, "attention");
    let best = 0, most = -1;
    for (let l = 0; l < this.header.layers; l++) {
      let total = 0;
      for (let h = 0; h < bundle.heads; h++) total += shares[l * bundle.heads + h];
      if (total > most) { most = total; best = l; }
    }
    return best;
  }

  // --- what to show ---------------------------------------------------------------------------------------

  get query() { return this.state.hoverQuery ?? this.state.query; }
  get patch() { return this.state.hoverPatch ?? this.state.patch; }
  get byHead() { return !["lens", "norms"].includes(this.state.mode); }
  get isSigned() { return ["difference", "push"].includes(this.state.mode); }

  bundleOf(query, run = 0) {
    const { mode } = this.state;
    const kind = mode === "push" ? "push" : "attention";
    const name = mode === "push" ? this.header.directions[this.state.direction] : "";
    const key = { kind, name, run, query };
    const bundle = this.store.get(key);
    const wantsHeads = !bundle || (bundle.heads === 1 && this.header.heads > 1);
    if (wantsHeads && this.host.fetch) this.ask(key);
    return bundle;
  }

  ask(key) {
    // One question at a time for what is looked at now; a pointer that passes by asks nothing.
    const name = keyOf(key);
    if (this.waiting.has(name) || this.failed.has(name)) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(async () => {
      if (key.query !== this.query && !(key.run === 1 && key.query === this.query)) return;
      this.waiting.set(name, true);
      this.tell();
      try {
        const { header, arrays } = unpack(await this.host.fetch(key));
        this.store.add(header, arrays, true);
      } catch (error) {
        this.failed.set(name, String(error.message ?? error));
        setTimeout(() => this.failed.delete(name), 4000);
      }
      this.waiting.delete(name);
      this.update();
    }, 90);
  }

  eachMap(bundle, visit) {
    // Calls visit(layer, head, offset of the map, its text and image scale) for the chosen layers and heads.
    const { layers } = this.header;
    const { layer, head } = this.state;
    const heads = bundle.heads;
    for (let l = layer === MEAN ? 0 : layer; l < (layer === MEAN ? layers : layer + 1); l++) {
      const one = head !== MEAN && heads > 1;
      for (let h = one ? head : 0; h < (one ? head + 1 : heads); h++) {
        const i = l * heads + h;
        visit(l, h, i * this.n, bundle.scales[2 * i], bundle.scales[2 * i + 1]);
      }
    }
  }

  sinkMass(bundle, l, offset, text, image) {
    let mass = 0;
    for (const p of this.header.sinks?.[l] ?? []) {
      mass += DECODE[bundle.maps[offset + p]] * (this.isImage[p] ? image : text);
    }
    return mass;
  }

  meanMap(bundle, withoutSinks) {
    const out = new Float32Array(this.n);
    const { maps } = bundle;
    const table = bundle.signed ? DECODE_SIGNED : DECODE;
    let count = 0;
    this.eachMap(bundle, (l, h, offset, text, image) => {
      let factor = 1;
      if (withoutSinks) {
        const left = 1 - this.sinkMass(bundle, l, offset, text, image);
        factor = left > 1e-6 ? 1 / left : 0;
      }
      text *= factor; image *= factor;
      for (let p = 0; p < this.n; p++) out[p] += table[maps[offset + p]] * (this.isImage[p] ? image : text);
      if (withoutSinks) {
        for (const p of this.header.sinks?.[l] ?? []) {
          out[p] -= table[maps[offset + p]] * (this.isImage[p] ? image : text);
        }
      }
      count++;
    });
    for (let p = 0; p < this.n; p++) out[p] /= count;
    if (withoutSinks && this.state.layer !== MEAN) {
      for (const p of this.header.sinks?.[this.state.layer] ?? []) out[p] = NaN; // a sink has no colour
    }
    return out;
  }

  shares(bundle, mode, position = null) {
    // For every layer and head: what goes to the pictures, or to one position.
    const name = `${mode}|${position}`;
    if (bundle.shares.has(name)) return bundle.shares.get(name);
    const { layers } = this.header;
    const { heads, maps, scales } = bundle;
    const table = bundle.signed ? DECODE_SIGNED : DECODE;
    const out = new Float32Array(layers * heads);
    for (let i = 0; i < layers * heads; i++) {
      const l = Math.floor(i / heads), offset = i * this.n, text = scales[2 * i], image = scales[2 * i + 1];
      const sinks = mode === "sinks" ? this.header.sinks?.[l] ?? [] : [];
      let total = 0;
      if (position !== null) {
        total = sinks.includes(position) ? 0 : table[maps[offset + position]] * (this.isImage[position] ? image : text);
      } else {
        for (let p = 0; p < this.n; p++) if (this.isImage[p]) total += table[maps[offset + p]];
        for (const p of sinks) if (this.isImage[p]) total -= table[maps[offset + p]];
        total *= image;
      }
      if (sinks.length) total /= Math.max(1e-6, 1 - this.sinkMass(bundle, l, offset, text, image));
      out[i] = total;
    }
    if (bundle.shares.size > 12) bundle.shares.clear();
    bundle.shares.set(name, out);
    return out;
  }

  layerMap(array, start, decode) {
    // The chosen layer of a [layer, pos] part of an array, or the mean over layers.
    const { layers } = this.header;
    const { layer } = this.state;
    const out = new Float32Array(this.n);
    const chosen = layer === MEAN ? [...Array(layers).keys()] : [layer];
    for (const l of chosen) for (let p = 0; p < this.n; p++) out[p] += decode(l, p, array[start + l * this.n + p]);
    return chosen.length > 1 ? out.map((v) => v / chosen.length) : out;
  }

  lensMap(word) {
    const { layers } = this.header;
    const maps = this.arrays.lens_maps, scales = this.arrays.lens_scales;
    return this.layerMap(maps, word * layers * this.n,
      (l, p, byte) => DECODE[byte] * scales[2 * (word * layers + l) + this.isImage[p]]);
  }

  currentMap() {
    // Values over all positions, their meaning, and the scale's ends.
    const { mode, word } = this.state;
    if (mode === "norms") {
      const values = this.layerMap(this.arrays.norms, 0, (l, p, v) => Math.log10(Math.max(v, 1e-9)));
      return { values, name: "length of the residual", show: (v) => number(10 ** v), low: null };
    }
    if (mode === "lens") {
      if (!this.header.lens.words.length) return null;
      const name = `probability of “${shown(this.header.lens.words[word]).trim()}”`;
      return { values: this.lensMap(word), name, show: percent, low: 0 };
    }
    const bundle = this.bundleOf(this.query);
    if (!bundle) return null;
    if (mode === "difference") {
      const second = this.bundleOf(this.query, 1);
      if (!second) return null;
      const values = this.meanMap(bundle, false), theirs = this.meanMap(second, false);
      for (let p = 0; p < this.n; p++) values[p] -= theirs[p];
      return { values, name: "attention, first picture less second", show: percent, signed: true, bundle, second };
    }
    if (mode === "push") {
      const name = `push on “${this.header.directions[this.state.direction]}”`;
      return { values: this.meanMap(bundle, false), name, show: number, signed: true, bundle };
    }
    const name = mode === "sinks" ? "attention without sinks" : "attention";
    return { values: this.meanMap(bundle, mode === "sinks"), name, show: percent, low: 0, bundle };
  }

  lookers(position) {
    // How much each token of text looks at a position, as far as its maps are here.
    const out = new Map();
    const { mode } = this.state;
    if (!["attention", "sinks", "difference"].includes(mode)) return out;
    for (const { at } of this.words) {
      if (at < position) continue;
      const bundle = this.store.get({ query: at });
      if (!bundle) continue;
      let total = 0, count = 0;
      const table = DECODE;
      this.eachMap(bundle, (l, h, offset, text, image) => {
        const isSink = mode === "sinks" && (this.header.sinks?.[l] ?? []).includes(position);
        total += isSink ? 0 : table[bundle.maps[offset + position]] * (this.isImage[position] ? image : text);
        count++;
      });
      out.set(at, total / count);
    }
    return out;
  }

  gridValues() {
    // [rows][columns] of numbers with their names: layers by heads, or by words at one position.
    const { layers } = this.header;
    const { mode } = this.state;
    if (mode === "norms") {
      const at = this.patch ?? this.query;
      const values = Float32Array.from({ length: layers }, (_, l) => this.arrays.norms[l * this.n + at]);
      return { values, columns: 1, name: "length of the residual here", show: number, column: () => "" };
    }
    if (mode === "lens") {
      const at = this.patch ?? this.query, { words } = this.header.lens, columns = words.length;
      if (!columns) return null;
      const values = new Float32Array(layers * columns);
      for (let w = 0; w < columns; w++) for (let l = 0; l < layers; l++) {
        const i = w * layers + l;
        values[l * columns + w] = DECODE[this.arrays.lens_maps[i * this.n + at]]
          * this.arrays.lens_scales[2 * i + this.isImage[at]];
      }
      return { values, columns, name: "probability here", show: percent, column: (w) => `“${shown(words[w]).trim()}”` };
    }
    const bundle = this.bundleOf(this.query);
    if (!bundle) return null;
    const position = this.patch;
    let values = this.shares(bundle, mode, position);
    if (mode === "difference") {
      const second = this.bundleOf(this.query, 1);
      if (!second || second.heads !== bundle.heads) return null;
      const theirs = this.shares(second, mode, position);
      values = values.map((v, i) => v - theirs[i]);
    }
    const place = position === null ? (this.isSigned ? "from all cells" : "to the picture") : "at this cell";
    const what = { push: "push", difference: "difference" }[mode] ?? "attention";
    const show = mode === "push" ? number : percent;
    return { values, columns: bundle.heads, name: `${what} ${place}`, show, column: (h) => `head ${h}` };
  }

  // --- building -------------------------------------------------------------------------------------------

  build() {
    const { header } = this;
    this.root.classList.add("veena-view");
    this.root.replaceChildren();
    const bar = element("div", { class: "vv-bar" });
    this.modes = element("div", { class: "vv-modes", role: "radiogroup", "aria-label": "What the maps show" });
    for (const mode of header.modes) {
      const button = element("button", { type: "button", role: "radio", "data-mode": mode, text: NAMES[mode] });
      button.addEventListener("click", () => this.set({ mode }));
      this.modes.append(button);
    }
    this.modes.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault(); event.stopPropagation();
      const at = header.modes.indexOf(this.state.mode);
      const mode = header.modes[(at + step + header.modes.length) % header.modes.length];
      this.set({ mode });
      this.modes.querySelector(`[data-mode="${mode}"]`).focus();
    });
    this.layerChoice = this.choice("Layer", [["mean", MEAN], ...range(header.layers)], (layer) => this.set({ layer }));
    this.headChoice = this.choice("Head", [["mean", MEAN], ...range(header.heads)], (head) => this.set({ head }));
    const words = (header.lens?.words ?? []).map((w, i) => [shown(w).trim() || "␣", i]);
    this.wordChoice = this.choice("Word", words, (word) => this.set({ word }));
    this.directionChoice = this.choice("Direction", header.directions.map((d, i) => [d, i]),
      (direction) => this.set({ direction }));
    const strength = element("input", { type: "range", min: 0, max: 100, value: this.state.strength * 100 });
    strength.addEventListener("input", () => this.set({ strength: strength.value / 100 }));
    const shared = element("input", { type: "checkbox" });
    shared.addEventListener("change", () => this.set({ shared: shared.checked }));
    this.sharedBox = element("label", { class: "vv-field", title: "One colour scale for all layers and heads" },
      shared, "same scale");
    bar.append(this.modes, this.layerChoice, this.headChoice, this.wordChoice, this.directionChoice,
      element("label", { class: "vv-field" }, "Map", strength), this.sharedBox);

    this.pictures = element("div", { class: "vv-pictures" });
    this.panels = header.panels.map((panel, i) => this.buildPanel(panel, i));
    if (!this.panels.length) this.pictures.append(element("p", { class: "vv-note", text: "This prompt has no picture." }));
    this.legend = element("canvas", { class: "vv-legend", "aria-hidden": "true" });
    this.legendLow = element("span", { class: "vv-number" });
    this.legendHigh = element("span", { class: "vv-number" });
    this.legendName = element("span");
    const legend = element("div", { class: "vv-legendrow" }, this.legendLow, this.legend, this.legendHigh, this.legendName);
    this.strip = this.buildStrip();
    const hint = element("p", { class: "vv-note", text: "Point at a word: where it looks. Point at a cell: which words look "
      + "at it. Click or Enter pins, Escape lets go. J, K: layers; H, L: heads; M: mean." });
    const left = element("div", { class: "vv-left" }, this.pictures, legend, this.strip, hint);

    this.grid = element("canvas", { class: "vv-grid", tabindex: "0", role: "img" });
    this.gridBox = element("div", { class: "vv-gridbox" }, this.grid);
    this.gridName = element("h3", { class: "vv-head" });
    this.gridLow = element("span", { class: "vv-number" });
    this.gridHigh = element("span", { class: "vv-number" });
    this.gridLegend = element("canvas", { class: "vv-legend", "aria-hidden": "true" });
    this.readout = element("div", { class: "vv-readout" });
    this.status = element("p", { class: "vv-status", role: "status", "aria-live": "polite" });
    const right = element("div", { class: "vv-right" }, this.gridName, this.gridBox,
      element("div", { class: "vv-legendrow" }, this.gridLow, this.gridLegend, this.gridHigh), this.status, this.readout);
    this.listenGrid();
    this.root.append(bar, element("div", { class: "vv-body" }, left, right));
    this.keys = (event) => this.key(event);
    this.root.addEventListener("keydown", this.keys);
  }

  choice(label, options, chosen) {
    const select = element("select", { "aria-label": label });
    for (const [text, value] of options) select.append(element("option", { value, text }));
    select.addEventListener("change", () => chosen(Number(select.value)));
    const field = element("label", { class: "vv-field" }, label, select);
    field.select = select;
    return field;
  }

  buildPanel(about, number) {
    const canvas = element("canvas", { tabindex: "0", role: "img" });
    const figure = element("figure", { class: "vv-picture" }, canvas);
    figure.append(element("figcaption"));
    this.pictures.append(figure);
    const panel = { about, canvas, figure, boxes: this.arrays[about.boxes], cells: this.arrays[about.cells], image: null };
    panel.figure.style.setProperty("--ratio", about.width / about.height);
    if (about.source) {
      const image = new Image();
      image.onload = () => { panel.image = image; this.draw(); };
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
      this.hover({ hoverPatch: cell === null ? null : panel.cells[cell] });
    });
    canvas.addEventListener("pointerleave", () => this.hover({ hoverPatch: null }));
    canvas.addEventListener("click", (event) => {
      const cell = cellOf(event);
      if (cell === null) return;
      this.pin({ patch: this.state.patch === panel.cells[cell] ? null : panel.cells[cell] });
    });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
      const now = panel.cells.indexOf(this.state.patch);
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        if (now < 0 && panel.cells.length) this.pin({ patch: panel.cells[this.middle(panel)] });
      }
      if (!step) return;
      event.preventDefault(); event.stopPropagation();
      const from = now < 0 ? this.middle(panel) : now;
      this.pin({ patch: panel.cells[now < 0 ? from : this.neighbour(panel, from, step)], hoverPatch: null });
    });
    panel.number = number;
    return panel;
  }

  middle(panel) { return this.nearest(panel, 0.5, 0.5); }

  nearest(panel, x, y) {
    let best = 0, least = Infinity;
    for (let i = 0; i < panel.cells.length; i++) {
      const [l, t, r, b] = panel.boxes.subarray(4 * i, 4 * i + 4);
      const far = ((l + r) / 2 - x) ** 2 + ((t + b) / 2 - y) ** 2;
      if (r > l && b > t && far < least) { least = far; best = i; }
    }
    return best;
  }

  neighbour(panel, from, [dx, dy]) {
    const [l, t, r, b] = panel.boxes.subarray(4 * from, 4 * from + 4);
    return this.nearest(panel, (l + r) / 2 + dx * (r - l), (t + b) / 2 + dy * (b - t));
  }

  buildStrip() {
    const strip = element("div", { class: "vv-strip", role: "listbox", "aria-label": "Tokens of prompt and answer" });
    this.chips = new Map();
    let part = null;
    for (const token of this.header.tokens) {
      if (token.at === undefined) {
        strip.append(element("span", { class: "vv-image", text: `picture ${token.image + 1} · ${token.n} tokens` }));
        continue;
      }
      if (token.part === "answer" && part !== "answer") strip.append(element("span", { class: "vv-part", text: "answer" }));
      part = token.part;
      const chip = element("button", {
        type: "button", role: "option", class: `vv-token vv-${token.part}`, "data-at": token.at, tabindex: "-1",
        title: `position ${token.at}`, text: shown(token.text) || "∅",
      });
      this.chips.set(token.at, chip);
      strip.append(chip);
    }
    const at = (event) => {
      const chip = event.target.closest?.(".vv-token");
      return chip ? Number(chip.dataset.at) : null;
    };
    strip.addEventListener("pointerover", (event) => this.hover({ hoverQuery: at(event) }));
    strip.addEventListener("pointerleave", () => this.hover({ hoverQuery: null }));
    strip.addEventListener("click", (event) => { if (at(event) !== null) this.pin({ query: at(event) }); });
    strip.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const order = this.words.map((w) => w.at);
      let now = order.indexOf(this.state.query);
      if (event.key === "Home") now = 0;
      else if (event.key === "End") now = order.length - 1;
      else if (step) now = Math.min(order.length - 1, Math.max(0, now + step));
      else return;
      event.preventDefault(); event.stopPropagation();
      this.pin({ query: order[now], hoverQuery: null });
      this.chips.get(order[now]).focus();
    });
    return strip;
  }

  listenGrid() {
    const cellOf = (event) => {
      const box = this.grid.getBoundingClientRect(), { columns } = this.gridShape ?? { columns: 1 };
      const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
      const row = Math.floor(((event.clientY - box.top) / box.height) * this.header.layers);
      return [Math.min(this.header.layers - 1, Math.max(0, row)), Math.min(columns - 1, Math.max(0, column))];
    };
    this.grid.addEventListener("pointermove", (event) => { this.gridHover = cellOf(event); this.tell(); });
    this.grid.addEventListener("pointerleave", () => { this.gridHover = null; this.tell(); });
    this.grid.addEventListener("click", (event) => {
      const [layer, column] = cellOf(event);
      this.pin(this.gridStep(layer, column));
    });
    this.grid.addEventListener("keydown", (event) => {
      const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      if (!step) return;
      event.preventDefault(); event.stopPropagation();
      this.move(...step);
    });
  }

  gridStep(layer, column) {
    const { mode } = this.state;
    if (mode === "norms") return { layer };
    if (mode === "lens") return { layer, word: column };
    return { layer, head: this.gridShape.columns === 1 && this.header.heads > 1 ? MEAN : column };
  }

  move(down, right) {
    const { state, header } = this;
    const by = (value, step, n) => (value === MEAN ? (step > 0 ? 0 : n - 1) : Math.min(n - 1, Math.max(0, value + step)));
    const next = {};
    if (down) next.layer = by(state.layer, down, header.layers);
    if (right && state.mode === "lens") next.word = by(state.word, right, header.lens.words.length);
    else if (right && this.byHead) next.head = by(state.head, right, header.heads);
    this.pin(next);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || ["SELECT", "INPUT"].includes(event.target.tagName)) return;
    const key = event.key.toLowerCase();
    const step = { j: [1, 0], k: [-1, 0], l: [0, 1], h: [0, -1] }[key];
    if (step) this.move(...step);
    else if (key === "m") this.pin({ layer: this.state.head === MEAN ? MEAN : this.state.layer, head: MEAN });
    else if (key === "escape") this.pin({ patch: null, hoverPatch: null, hoverQuery: null });
    else return;
    event.preventDefault();
  }

  // --- changing -------------------------------------------------------------------------------------------

  hover(change) {
    const before = this.state;
    if (Object.entries(change).every(([k, v]) => before[k] === v)) return;
    this.set(change);
  }

  pin(change) {
    this.set(change);
    const { query, layer, head, patch, mode } = this.state;
    this.host.pinned?.({ query, layer, head, patch, mode });
  }

  set(change) {
    Object.assign(this.state, change);
    if (!this.frame) this.frame = requestAnimationFrame(() => { this.frame = 0; this.update(); });
  }

  update() {
    const { state, header } = this;
    for (const button of this.modes.children) {
      const chosen = button.dataset.mode === state.mode;
      button.setAttribute("aria-checked", chosen);
      button.tabIndex = chosen ? 0 : -1;
    }
    this.layerChoice.select.value = state.layer;
    this.headChoice.select.value = state.head;
    this.wordChoice.select.value = state.word;
    this.directionChoice.select.value = state.direction;
    this.headChoice.hidden = !this.byHead;
    this.wordChoice.hidden = state.mode !== "lens" || !header.lens?.words.length;
    this.directionChoice.hidden = state.mode !== "push";
    this.sharedBox.hidden = !this.byHead;
    const isPair = state.mode === "difference";
    for (const { figure, about } of this.panels) {
      figure.hidden = about.run === 1 && !isPair;
      const which = isPair ? (about.run ? "second: " : "first: ") : "";
      figure.lastChild.textContent = `${which}${about.name}, ${about.grid[0]} × ${about.grid[1]} cells`;
    }
    this.map = this.currentMap();
    this.gridShape = this.gridValues();
    this.draw();
    this.paintTokens();
    this.tell();
  }

  range(values, positions) {
    // The ends of a colour scale over some positions.
    let low = Infinity, high = -Infinity;
    for (const p of positions) { const v = values[p]; if (v < low) low = v; if (v > high) high = v; }
    return Number.isFinite(low) ? [low, high] : [0, 0];
  }

  pictureRange() {
    if (!this.map) return [0, 0];
    const { bundle, second, values, signed } = this.map;
    let [low, high] = [Infinity, -Infinity];
    for (const panel of this.panels) {
      const [a, b] = this.range(values, panel.cells);
      low = Math.min(low, a); high = Math.max(high, b);
    }
    if (this.state.shared && bundle) {
      // The largest image scale of any map of this token.
      let most = 0;
      for (const source of [bundle, second]) if (source) for (let i = 1; i < source.scales.length; i += 2) most = Math.max(most, source.scales[i]);
      [low, high] = [-most, most];
    }
    if (!Number.isFinite(low)) [low, high] = [0, 0];
    if (signed) { const most = Math.max(Math.abs(low), Math.abs(high)); return [-most, most]; }
    return [this.map.low ?? low, high];
  }

  // --- drawing --------------------------------------------------------------------------------------------

  resize() {
    this.draw();
  }

  sized(canvas, ratio = null) {
    // A canvas as many device pixels large as it is on the screen; null where it is hidden.
    const width = canvas.clientWidth, height = ratio === null ? canvas.clientHeight : Math.round(width / ratio);
    if (!width || !height) return null;
    const scale = window.devicePixelRatio || 1;
    const w = Math.round(width * scale), h = Math.round(height * scale);
    if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    return { context, w, h, scale };
  }

  draw() {
    const range = this.pictureRange();
    for (const panel of this.panels) this.drawPanel(panel, range);
    this.drawGrid();
    if (this.map) this.drawLegend(this.legend, this.map.signed ? "signed" : "picture");
    this.legendLow.textContent = this.map ? this.map.show(range[0]) : "";
    this.legendHigh.textContent = this.map ? this.map.show(range[1]) : "";
    this.legendName.textContent = this.map ? this.map.name : this.missing();
    this.legend.style.visibility = this.map && this.panels.length ? "visible" : "hidden";
  }

  missing() {
    const name = keyOf({ kind: this.state.mode === "push" ? "push" : "attention",
      name: this.state.mode === "push" ? this.header.directions[this.state.direction] : "", query: this.query });
    if (this.failed.has(name)) return `not to be had: ${this.failed.get(name)}`;
    if (this.host.fetch) return "being computed …";
    if (this.state.mode === "lens") return "no word to map; point at a cell to read it";
    return "the maps of this token are not in this file";
  }

  drawPanel(panel, [low, high]) {
    const sized = this.sized(panel.canvas, panel.about.width / panel.about.height);
    if (!sized) return;
    const { context, w, h, scale } = sized;
    context.globalAlpha = 1;
    context.fillStyle = "#eceef1";
    context.fillRect(0, 0, w, h);
    if (panel.image) {
      context.imageSmoothingEnabled = panel.about.width > 96;
      context.drawImage(panel.image, 0, 0, w, h);
    }
    const cells = panel.cells, boxes = panel.boxes;
    if (this.map) {
      const { values, signed } = this.map;
      const colours = this.header.colours[signed ? "signed" : "picture"];
      const strength = this.state.strength;
      for (let i = 0; i < cells.length; i++) {
        const value = values[cells[i]];
        if (Number.isNaN(value)) continue;
        const share = high > low ? Math.min(1, Math.max(0, (value - low) / (high - low))) : signed ? 0.5 : 0;
        // Strong cells hide more of the picture than weak ones, so that the face stays where nobody looks.
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
    mark(this.state.patch, "#56B4E9", 3);
    if (this.state.hoverPatch !== this.state.patch) mark(this.state.hoverPatch, "#ffffff", 2);
    const place = panel.about.grid;
    const label = `${panel.about.name}, ${place[0]} by ${place[1]} cells; arrow keys choose a cell`;
    panel.canvas.setAttribute("aria-label", label);
  }

  drawGrid() {
    const shape = this.gridShape, { layers } = this.header;
    this.grid.style.height = `${Math.min(420, Math.max(120, layers * Math.min(28, 420 / layers)))}px`;
    const sized = this.sized(this.grid);
    if (!sized) return;
    const { context, w, h, scale } = sized;
    context.fillStyle = "#eceef1";
    context.fillRect(0, 0, w, h);
    const across = this.state.mode === "lens" ? " × words" : this.state.mode === "norms" ? "" : shape?.columns === 1 ? ", mean over heads" : " × heads";
    this.gridName.textContent = `Layers${across}${shape ? `: ${shape.name}` : ""}`;
    if (!shape) { this.gridLow.textContent = this.gridHigh.textContent = ""; return; }
    const { values, columns } = shape;
    let [low, high] = this.range(values, values.keys());
    if (this.isSigned) { high = Math.max(Math.abs(low), Math.abs(high)); low = -high; }
    else if (this.state.mode !== "norms") low = 0;
    const colours = this.header.colours[this.isSigned ? "signed" : "cells"];
    const gap = w / columns > 8 * scale && h / layers > 8 * scale ? scale : 0;
    for (let i = 0; i < values.length; i++) {
      const row = Math.floor(i / columns), column = i % columns;
      const x = Math.round((column * w) / columns), y = Math.round((row * h) / layers);
      const share = high > low ? (values[i] - low) / (high - low) : this.isSigned ? 0.5 : 0;
      context.fillStyle = colours[Math.round(share * 255)];
      context.fillRect(x, y, Math.round(((column + 1) * w) / columns) - x - gap, Math.round(((row + 1) * h) / layers) - y - gap);
    }
    const { layer, head, word, mode } = this.state;
    const column = mode === "lens" ? word : mode === "norms" || columns === 1 ? MEAN : head;
    const left = column === MEAN ? 0 : (column * w) / columns, wide = column === MEAN ? w : w / columns;
    const top = layer === MEAN ? 0 : (layer * h) / layers, tall = layer === MEAN ? h : h / layers;
    for (const [colour, width] of [["#000000", 4], ["#ffffff", 2]]) {
      context.strokeStyle = colour; context.lineWidth = width * scale;
      context.strokeRect(left + scale, top + scale, wide - 2 * scale - gap, tall - 2 * scale - gap);
    }
    this.gridLow.textContent = shape.show(low);
    this.gridHigh.textContent = shape.show(high);
    this.drawLegend(this.gridLegend, this.isSigned ? "signed" : "cells");
    const what = layer === MEAN ? "mean over layers" : `layer ${layer}`;
    const where = column === MEAN ? "" : `, ${shape.column(column)}`;
    this.grid.setAttribute("aria-label",
      `${layers} layers by ${columns} columns, ${shape.name}; chosen: ${what}${where}; arrow keys move`);
  }

  drawLegend(canvas, palette) {
    const sized = this.sized(canvas);
    if (!sized) return;
    const { context, w, h } = sized;
    for (let x = 0; x < w; x++) {
      context.fillStyle = this.header.colours[palette][Math.min(255, Math.floor((x / w) * 256))];
      context.fillRect(x, 0, 1, h);
    }
  }

  paintTokens() {
    const { state } = this;
    // A cell that is pointed at colours the words that look at it; else words show what the query gives them.
    const patch = this.patch;
    let values = new Map(), signed = false;
    if (patch !== null && state.hoverQuery === null) values = this.lookers(patch);
    if (!values.size && this.map && !(patch !== null && state.hoverQuery === null)) {
      signed = Boolean(this.map.signed);
      for (const { at } of this.words) values.set(at, this.map.values[at]);
    }
    let least = Infinity, most = 0;
    for (const v of values.values()) if (!Number.isNaN(v)) { most = Math.max(most, Math.abs(v)); least = Math.min(least, v); }
    const floor = state.mode === "norms" ? least : 0;
    for (const { at } of this.words) {
      const chip = this.chips.get(at), value = values.get(at);
      const chosen = at === state.query;
      chip.setAttribute("aria-selected", chosen);
      chip.tabIndex = chosen ? 0 : -1;
      chip.classList.toggle("vv-hovered", at === state.hoverQuery);
      if (value === undefined || Number.isNaN(value) || most <= floor) { chip.style.backgroundColor = ""; continue; }
      const share = (Math.abs(value) - floor) / (most - floor);
      chip.style.backgroundColor = mixed(WHITE, signed && value < 0 ? BLUE : ORANGE, Math.sqrt(Math.max(0, share)));
    }
  }

  // --- words ----------------------------------------------------------------------------------------------

  nameOf(position) {
    const word = this.words.find((w) => w.at === position);
    if (word) return `“${shown(word.text).trim() || "␣"}”`;
    const panel = this.panels.find((p) => p.cells.includes(position));
    if (!panel) return `position ${position}`;
    const i = panel.cells.indexOf(position), [rows, columns] = panel.about.grid;
    const [l, t, r, b] = panel.boxes.subarray(4 * i, 4 * i + 4);
    const name = this.header.panels.filter((p) => p.run === 0).length > 1 ? ` of ${panel.about.name}` : "";
    return `cell ${Math.floor(((t + b) / 2) * rows) + 1}, ${Math.floor(((l + r) / 2) * columns) + 1}${name}`;
  }

  tell() {
    const { state, header } = this;
    const layer = state.layer === MEAN ? "mean of layers" : `layer ${state.layer}`;
    const head = !this.byHead ? "" : state.head === MEAN ? ", mean of heads" : `, head ${state.head}`;
    let text = `${layer}${head}`;
    const shape = this.gridShape;
    if (this.gridHover && shape) {
      const [row, column] = this.gridHover, value = shape.values[row * shape.columns + column];
      text = `layer ${row}${shape.columns > 1 ? `, ${shape.column(column)}` : ""}: ${shape.show(value ?? 0)}`;
    } else if (this.patch !== null && this.map) {
      text += `: ${this.nameOf(this.patch)} ${this.map.show(this.map.values[this.patch])}`;
      if (this.map.bundle) text += ` from ${this.nameOf(this.query)}`;
    } else if (this.map?.bundle) {
      let total = 0;
      for (let p = 0; p < this.n; p++) if (this.isImage[p] && !Number.isNaN(this.map.values[p])) total += this.map.values[p];
      const verb = { push: "takes from the picture", difference: "looks at the picture more by" }[state.mode] ?? "gives the picture";
      text += `: ${this.nameOf(this.query)} ${verb} ${this.map.show(total)}`;
    }
    else if (this.map) text += `: ${this.nameOf(this.query)} ${this.map.show(this.map.values[this.query])}`;
    if (this.waiting.size) text += " · computing …";
    const note = this.map?.bundle && this.map.bundle.heads === 1 && header.heads > 1 && state.head !== MEAN
      && !this.host.fetch ? " (this file holds the mean over heads for this token)" : "";
    this.status.textContent = text + note;
    this.readout.replaceChildren(...this.details());
  }

  details() {
    const { state, header } = this;
    if (state.mode === "lens") {
      const at = this.patch ?? this.query;
      const { shape } = this.arrays.lens_ids, ranks = shape[2];
      const table = element("table", {}, element("caption", { text: `What the stream says at ${this.nameOf(at)}` }));
      for (let l = 0; l < header.layers; l++) {
        const row = element("tr", {}, element("th", { scope: "row", text: String(l) }));
        for (let r = 0; r < Math.min(3, ranks); r++) {
          const i = (l * this.n + at) * ranks + r;
          const word = shown(header.lens.texts[this.arrays.lens_ids[i]]).trim() || "␣";
          row.append(element("td", {}, element("span", { text: word }),
            element("small", { text: ` ${Math.round(this.arrays.lens_probs[i] / 2.55)} %` })));
        }
        if (l === state.layer) row.className = "vv-chosen";
        table.append(row);
      }
      return [table];
    }
    if (!this.map) return [];
    const lookers = this.patch !== null && state.hoverQuery === null ? this.lookers(this.patch) : new Map();
    if (lookers.size) {
      const rows = [...lookers].sort((a, b) => b[1] - a[1]).slice(0, 5);
      return [this.listed(`Words that look at ${this.nameOf(this.patch)}`, rows, percent)];
    }
    const order = [...this.panels.flatMap((p) => (p.about.run ? [] : [...p.cells]))]
      .filter((p) => !Number.isNaN(this.map.values[p]));
    const size = this.isSigned ? (p) => Math.abs(this.map.values[p]) : (p) => this.map.values[p];
    const best = [];
    for (const p of order) {
      if (best.length < 5 || size(p) > size(best[4])) {
        best.push(p);
        best.sort((a, b) => size(b) - size(a));
        best.length = Math.min(5, best.length);
      }
    }
    if (!best.length) return [];
    return [this.listed("Strongest cells", best.map((p) => [p, this.map.values[p]]), this.map.show)];
  }

  listed(caption, rows, show) {
    const table = element("table", {}, element("caption", { text: caption }));
    for (const [p, value] of rows) {
      table.append(element("tr", {}, element("td", { text: this.nameOf(p) }),
        element("td", { class: "vv-number", text: show(value) })));
    }
    return table;
  }

  destroy() {
    this.observer.disconnect();
    clearTimeout(this.timer);
    cancelAnimationFrame(this.frame);
    this.root.removeEventListener("keydown", this.keys);
    this.root.replaceChildren();
    this.store = new Store();
  }
}

function range(n) {
  return [...Array(n).keys()].map((i) => [String(i), i]);
}

// --- hosts ------------------------------------------------------------------------------------------------

function refuse(root, reason) {
  root.replaceChildren(element("p", { class: "vv-note", role: "alert", text: `The view cannot be shown: ${reason}` }));
}

export function mount(root, buffer, host = {}) {
  root.veenaView?.destroy();
  try {
    root.veenaView = new View(root, buffer, host);
  } catch (error) {
    root.veenaView = undefined;
    refuse(root, error.message);
    throw error;
  }
  return root.veenaView;
}

export async function openPage(root, base64) {
  let buffer;
  try {
    const packed = Uint8Array.from(atob(base64.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    buffer = await new Response(stream).arrayBuffer();
  } catch (error) {
    refuse(root, `its data were cut short or changed (${error.message})`);
    return undefined;
  }
  return mount(root, buffer);
}

function render({ model, el }) {
  const asked = new Map();
  let next = 0;
  const buffer = ({ buffer: whole, byteOffset, byteLength }) => whole.slice(byteOffset, byteOffset + byteLength);
  const answered = (message, buffers) => {
    const waiting = asked.get(message?.number);
    if (!waiting) return;
    asked.delete(message.number);
    if (message.error) waiting.reject(new Error(message.error));
    else waiting.resolve(buffer(buffers[0]));
  };
  model.on("msg:custom", answered);
  const root = element("div");
  el.append(root);
  const view = mount(root, buffer(model.get("payload")), {
    fetch: (key) => new Promise((resolve, reject) => {
      asked.set(next, { resolve, reject });
      model.send({ number: next++, key });
    }),
    pinned: (state) => { model.set("pinned", state); model.save_changes(); },
  });
  return () => { model.off("msg:custom", answered); view.destroy(); };
}

export default { render };
