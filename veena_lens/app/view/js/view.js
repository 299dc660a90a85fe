// One view: its data, what is chosen, pinned and pointed at, and what follows from a change.

import { drawLegend } from "./canvas.js";
import { keyOf, MEAN, Store, unpack } from "./data.js";
import { drawGrid } from "./grid.js";
import { build } from "./layout.js";
import { currentMap, gridValues } from "./maps.js";
import { drawPanel } from "./panels.js";
import { pictureRange, scaleName } from "./scales.js";
import { paintTokens } from "./strip.js";
import { captionOf, missing, tell } from "./words.js";

export class View {
  constructor(root, buffer, host = {}) {
    this.root = root;
    this.host = host;
    const { header, arrays } = unpack(buffer);
    Object.assign(this, { header, arrays, store: new Store(), waiting: new Map(), failed: new Map() });
    this.store.add(header, arrays, false);
    this.n = header.positions;
    this.isImage = arrays.is_image;
    this.words = header.tokens.filter((t) => t.at !== undefined);
    this.end = Math.max(-1, ...this.words.map((t) => t.at)) + 1; // where the next word would stand
    this.start = Math.min(this.end, ...this.words.map((t) => t.at), ...header.panels.map((p) => arrays[p.cells].reduce((a, b) => Math.min(a, b), this.end)));
    this.state = {
      mode: header.modes[0] ?? "attention", layer: header.layer ?? MEAN, head: MEAN, query: header.query, hoverQuery: null,
      patch: null, hoverPatch: null, word: 0, direction: 0, strength: 0.75, shared: true, predicts: true,
    };
    Object.assign(this.state, header.open, host.open);
    build(this);
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.pictures);
    this.observer.observe(this.gridBox);
    this.update();
  }

  get query() { return this.state.hoverQuery ?? this.state.query; }

  get patch() { return this.state.hoverPatch ?? this.state.patch; }

  get byHead() { return !["lens", "norms", "effects"].includes(this.state.mode); }

  get isSigned() { return ["difference", "push", "effects"].includes(this.state.mode); }

  get predicts() { return this.state.predicts && !["norms", "effects"].includes(this.state.mode); }

  queryOf(at) {
    // The position that is read for a word: the one before it, which predicts it, or its own.
    return (this.predicts && at > this.start) || at === this.end ? at - 1 : at;
  }

  wordOf(query) {
    // The place of the word for which a position is read.
    return this.predicts && this.chips.has(query + 1) ? query + 1 : query;
  }

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
      tell(this);
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
    event.stopPropagation(); // in a notebook M alone would turn the cell into text
  }

  hover(change) {
    const before = this.state;
    if (Object.entries(change).every(([k, v]) => before[k] === v)) return;
    this.set(change);
  }

  pin(change) {
    this.set(change);
    const { query, layer, head, patch, mode, word, direction } = this.state;
    this.host.pinned?.({ query, layer, head, patch, mode, word, direction });
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
    this.placeChoice.select.value = Number(state.predicts);
    this.placeChoice.hidden = ["norms", "effects"].includes(state.mode);
    this.chips.get(this.end).hidden = !this.predicts;
    const isPair = state.mode === "difference";
    this.map = currentMap(this);
    for (const panel of this.panels) {
      panel.figure.hidden = panel.about.run === 1 && !isPair;
      panel.figure.lastChild.textContent = captionOf(this, panel, isPair);
    }
    this.gridShape = gridValues(this);
    this.draw();
    paintTokens(this);
    tell(this);
  }

  tell() { tell(this); }

  draw() {
    const range = pictureRange(this);
    for (const panel of this.panels) drawPanel(this, panel, range);
    drawGrid(this);
    if (this.map) drawLegend(this, this.legend, this.map.signed ? "signed" : "picture");
    this.legendLow.textContent = this.map ? this.map.show(range[0]) : "";
    this.legendHigh.textContent = this.map ? this.map.show(range[1]) : "";
    this.legendName.textContent = this.map ? `${this.map.name}${scaleName(this)}` : missing(this);
    this.legend.style.visibility = this.map && this.panels.length ? "visible" : "hidden";
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
