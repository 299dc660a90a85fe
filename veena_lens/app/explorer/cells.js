// A grid of numbers to look at and to click: rows from top to bottom, RdBu around 0, one tab stop for the whole grid.

const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
};

export function cells(root, data, chosen) {
  root.replaceChildren();
  if (!data) return;
  const { values, rows, columns, rowName, columnName } = data;
  let most = 0;
  for (const row of values) for (const v of row) if (v !== null) most = Math.max(most, Math.abs(v));
  const colourOf = (v) => (v === null ? data.missing : data.colours[Math.round(((v / (most || 1) + 1) / 2) * 255)]);
  const place = (r, c) => {
    if (columnName === "head") return `L${rows[r]}H${columns[c]}`;
    return columns.length === 1 ? `${rowName} ${rows[r]}` : `${rowName} ${rows[r]}, ${columnName} ${columns[c]}`;
  };
  const name = (r, c) => {
    const v = values[r][c];
    return `${place(r, c)}: ${v === null ? "not run yet" : v.toFixed(3)}`;
  };
  const status = element("p", { class: "veena-status", "aria-live": "polite", text: data.done < rows.length ? `${data.done} of ${rows.length} ${rowName}s done` : "" });
  const table = element("div", { class: "veena-cells", role: "grid", "aria-label": data.title });
  table.style.setProperty("--columns", columns.length);
  const buttons = values.map((row, r) => {
    const line = element("div", { role: "row", class: "veena-cellrow" }, element("span", { class: "veena-cellname", role: "rowheader", text: rows[r] }));
    const made = row.map((v, c) => {
      const button = element("button", { type: "button", role: "gridcell", tabindex: "-1", "aria-label": name(r, c), title: name(r, c) });
      button.style.backgroundColor = colourOf(v);
      button.addEventListener("click", () => chosen({ row: r, column: c }));
      button.addEventListener("focus", () => { status.textContent = name(r, c); });
      button.addEventListener("pointerenter", () => { status.textContent = name(r, c); });
      line.append(button);
      return button;
    });
    table.append(line);
    return made;
  });
  const head = element("div", { class: "veena-cellrow veena-cellhead", "aria-hidden": "true" }, element("span", { class: "veena-cellname", text: columns.length > 1 ? `${rowName} \\ ${columnName}` : rowName }));
  const step = Math.ceil(columns.length / 16);
  columns.forEach((c, i) => head.append(element("span", { text: i % step ? "" : c })));
  if (buttons.length && buttons[0].length) buttons[0][0].tabIndex = 0;
  table.addEventListener("keydown", (event) => {
    const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    const r0 = buttons.findIndex((row) => row.includes(event.target)), c0 = buttons[r0]?.indexOf(event.target) ?? 0;
    const r = Math.min(rows.length - 1, Math.max(0, r0 + move[0])), c = Math.min(columns.length - 1, Math.max(0, c0 + move[1]));
    event.target.tabIndex = -1;
    buttons[r][c].tabIndex = 0;
    buttons[r][c].focus();
  });
  const bar = element("div", { class: "veena-scale", "aria-hidden": "true" });
  bar.style.background = `linear-gradient(to right, ${[0, 64, 127, 191, 255].map((i) => data.colours[i]).join(",")})`;
  root.append(element("h3", { class: "veena-title", text: data.title }), head, table,
    element("div", { class: "veena-scalerow" }, element("span", { text: (-most).toFixed(2) }), bar, element("span", { text: most.toFixed(2) }), element("span", { text: data.unit })), status);
}
