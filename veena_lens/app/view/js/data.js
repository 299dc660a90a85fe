// A view's binary and the maps that came with it or later.

export const DECODE = new Float32Array(256);
export const DECODE_SIGNED = new Float32Array(256);
for (let i = 0; i < 256; i++) {
  DECODE[i] = (i / 255) ** 2;
  const w = (i - 128) / 127;
  DECODE_SIGNED[i] = w * Math.abs(w);
}
export const MEAN = -1;
const KEPT_BYTES = 192 * 2 ** 20; // of maps that were asked for
const TYPES = { uint8: Uint8Array, int32: Int32Array, float32: Float32Array };

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

export function keyOf({ kind = "attention", name = "", run = 0, query }) {
  return `${kind}|${name}|${run}|${query}`;
}

export class Store {
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
