// The detail map over the picture: a trace's `complexity`, a pixel a patch.

// black, violet, red, orange, pale yellow: rising in lightness, so that it can be read without its hues
const COLOURS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];

/** Draw "where" or "when" onto a canvas, and return what the ends of the scale mean. */
export function drawMap(canvas, complexity, kind) {
  const rows = complexity[kind];
  const values = rows.flat();
  const low = Math.min(...values);
  const high = Math.max(...values);
  canvas.width = rows[0].length;
  canvas.height = rows.length;
  const pixels = new ImageData(canvas.width, canvas.height);
  values.forEach((value, index) => pixels.data.set([...colour((value - low) / (high - low || 1)), 255], 4 * index));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return kind === "where"
    ? [`${low.toFixed(2)} ×`, `${high.toFixed(2)} × the picture’s mean detail`]
    : [`step ${(low + 1).toFixed(1)}`, `step ${(high + 1).toFixed(1)}, the mean step of the detail`];
}

/** The colour of a share between 0 and 1. */
function colour(share) {
  const place = share * (COLOURS.length - 1);
  const index = Math.min(Math.floor(place), COLOURS.length - 2);
  return COLOURS[index].map((one, channel) => one + (COLOURS[index + 1][channel] - one) * (place - index));
}
