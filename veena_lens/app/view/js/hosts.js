// One view of a run for three hosts: a page, a notebook widget, the explorer. No framework, nothing fetched by itself.
// openPage(element, base64) opens data that lie in a page; mount(element, buffer, host) is what every host calls;
// the default export is anywidget's. host: {fetch(key) -> Promise<ArrayBuffer>, pinned(state), open: {layer, head}}.

import { element } from "./elements.js";
import { View } from "./view.js";

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
