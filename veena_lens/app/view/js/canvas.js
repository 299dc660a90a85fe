// Canvases as sharp as the screen, and colour scales.

export function sized(canvas, ratio = null) {
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

export function drawLegend(view, canvas, palette) {
  const place = sized(canvas);
  if (!place) return;
  const { context, w, h } = place;
  for (let x = 0; x < w; x++) {
    context.fillStyle = view.header.colours[palette][Math.min(255, Math.floor((x / w) * 256))];
    context.fillRect(x, 0, 1, h);
  }
}
