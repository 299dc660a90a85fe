// The tokens of prompt and answer: a list with one stop for the keyboard, coloured by what is looked at.

import { element, shown } from "./elements.js";
import { lookers } from "./maps.js";

// Token backgrounds stay light, so that dark words on them keep a contrast above 4.5 : 1.
const WHITE = [255, 255, 255], ORANGE = [242, 166, 66], BLUE = [116, 184, 232];

function mixed(from, to, share) {
  return `rgb(${from.map((a, i) => Math.round(a + (to[i] - a) * share)).join(",")})`;
}

export function buildStrip(view) {
  const strip = element("div", { class: "vv-strip", role: "listbox", "aria-label": "Tokens of prompt and answer" });
  view.chips = new Map();
  let part = null;
  for (const token of view.header.tokens) {
    if (token.at === undefined) {
      strip.append(element("span", { class: "vv-image", text: `image ${token.image + 1} · ${token.n} tokens` }));
      continue;
    }
    if (token.part === "answer" && part !== "answer") strip.append(element("span", { class: "vv-part", text: "answer" }));
    part = token.part;
    const chip = element("button", {
      type: "button", role: "option", class: `vv-token vv-${token.part}`, "data-at": token.at, tabindex: "-1",
      title: `its own position: ${token.at}`, text: shown(token.text) || "∅",
    });
    view.chips.set(token.at, chip);
    strip.append(chip);
  }
  // What the last position predicts, where the answer goes on or has not begun.
  const next = element("button", { type: "button", role: "option", class: "vv-token vv-next", "data-at": view.end,
    tabindex: "-1", title: "the word that would come next", text: "next word" });
  view.chips.set(view.end, next);
  strip.append(next);
  const at = (event) => {
    const chip = event.target.closest?.(".vv-token");
    return chip ? view.queryOf(Number(chip.dataset.at)) : null;
  };
  strip.addEventListener("pointerover", (event) => view.hover({ hoverQuery: at(event) }));
  strip.addEventListener("pointerleave", () => view.hover({ hoverQuery: null }));
  strip.addEventListener("click", (event) => { if (at(event) !== null) view.pin({ query: at(event) }); });
  strip.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const order = [...view.chips.keys()].filter((at) => !view.chips.get(at).hidden);
    let now = order.indexOf(view.wordOf(view.state.query));
    if (event.key === "Home") now = 0;
    else if (event.key === "End") now = order.length - 1;
    else if (step) now = Math.min(order.length - 1, Math.max(0, now + step));
    else return;
    event.preventDefault(); event.stopPropagation();
    view.pin({ query: view.queryOf(order[now]), hoverQuery: null });
    view.chips.get(order[now]).focus();
  });
  return strip;
}

export function paintTokens(view) {
  const { state } = view;
  // A cell that is pointed at colours the words that look at it; else words show what the query gives them.
  const patch = view.patch;
  let values = new Map(), signed = false;
  if (patch !== null && state.hoverQuery === null) values = lookers(view, patch);
  if (!values.size && view.map && !(patch !== null && state.hoverQuery === null)) {
    signed = Boolean(view.map.signed);
    // Of the lens a word shows what is read where it is predicted; otherwise what its own position gets.
    for (const { at } of view.words) values.set(at, view.map.values[state.mode === "lens" ? view.queryOf(at) : at]);
  }
  let least = Infinity, most = 0;
  for (const v of values.values()) if (!Number.isNaN(v)) { most = Math.max(most, Math.abs(v)); least = Math.min(least, v); }
  const floor = state.mode === "norms" ? least : 0;
  const pinned = view.wordOf(state.query), pointed = state.hoverQuery === null ? null : view.wordOf(state.hoverQuery);
  for (const [at, chip] of view.chips) {
    const value = values.get(at), chosen = at === pinned;
    chip.setAttribute("aria-selected", chosen);
    chip.tabIndex = chosen ? 0 : -1;
    chip.classList.toggle("vv-hovered", at === pointed);
    if (value === undefined || Number.isNaN(value) || most <= floor) { chip.style.backgroundColor = ""; continue; }
    const share = (Math.abs(value) - floor) / (most - floor);
    chip.style.backgroundColor = mixed(WHITE, signed && value < 0 ? BLUE : ORANGE, Math.sqrt(Math.max(0, share)));
  }
}
