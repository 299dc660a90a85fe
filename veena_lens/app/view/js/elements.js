// Elements, and numbers and tokens as text.

export const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
};

export const percent = (x) => (Math.abs(x) >= 0.0995 ? `${Math.round(x * 100)} %` : `${(x * 100).toPrecision(2)} %`);
export const number = (x) => (x === 0 ? "0" : Math.abs(x) >= 100 ? x.toFixed(0) : x.toPrecision(3));
export const shown = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥");

export function headName(layer, head) {
  // L2H5, as everywhere; -1 is the mean over heads or layers.
  if (layer >= 0 && head >= 0) return `L${layer}H${head}`;
  const where = layer < 0 ? "mean over layers" : `layer ${layer}`;
  return head < 0 ? `${where}, mean over heads` : `${where}, head ${head}`;
}

export function numbered(n) {
  return [...Array(n).keys()].map((i) => [String(i), i]);
}
