// The charts of the explorable: maps of error, spectra, and what is left at every rank. Their ink is that of the text
// around. eora_lab/plots/explorable.py puts this file before explorable.js, which says what the numbers are.

const PAIR = { svd: ["error of the weights, R Rᵀ", "weight"], eora: ["error of the outputs, R S Rᵀ", "output"] };
const SIDES = [42, 14]; // of the chart, where the slider's track begins and ends

function made(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const html = (tag, attributes = {}, ...children) => made(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  made(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const percent = (share) => {
  const value = 100 * share;
  return value > 0 && value < 0.05 ? "under 0.1 %" : `${value.toFixed(value < 9.95 ? 1 : 0)} %`;
};
const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

function ramp(colours) {
  const stops = colours.map((colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)));
  return Uint8ClampedArray.from({ length: 256 * 4 }, (_, i) => {
    const [place, channel] = [((i >> 2) / 255) * (stops.length - 1), i % 4];
    const [low, part] = [Math.floor(place), place % 1];
    if (channel === 3) return 255;
    return stops[low][channel] * (1 - part) + (stops[low + 1] ?? stops[low])[channel] * part;
  });
}

function drawMap(canvas, view, method, index, colours) {
  const bytes = atob(view.maps[method][index]);
  Object.assign(canvas, { width: view.columns, height: view.rows });
  const image = new ImageData(view.columns, view.rows);
  for (let i = 0; i < bytes.length; i++) {
    const at = 4 * bytes.charCodeAt(i);
    image.data.set(colours.subarray(at, at + 4), 4 * i);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function drawSpectrum(figure, view, method, rank, colour) {
  const [width, height] = [figure.clientWidth, figure.clientHeight];
  const [left, right, top, bottom] = [42, width - 4, 6, height - 20];
  const all = Object.values(view.spectra).flat();
  const last = Math.max(2, ...all.map(([direction]) => direction));
  const high = Math.max(...all.map(([, share]) => share)) || 1;
  const low = Math.max(1e-4 * high, Math.min(...all.map(([, share]) => share)));
  const x = (direction) => left + ((right - left) * Math.log(direction)) / Math.log(last);
  const y = (share) => {
    const part = Math.log(Math.max(share, low) / low) / Math.log((1.2 * high) / low);
    return bottom - (bottom - top) * part;
  };
  const points = view.spectra[method].map(([direction, share]) => [x(direction), y(share)]);
  const edge = rank ? x(Math.min(rank, last)) : left;
  const inside = points.filter(([at]) => at <= edge);
  const beyond = points.find(([at]) => at > edge);
  if (beyond && inside.length) {
    const [[x0, y0], [x1, y1]] = [inside.at(-1), beyond];
    inside.push([edge, y0 + ((y1 - y0) * (edge - x0)) / (x1 - x0)]);
  }
  const parts = [];
  for (let power = Math.floor(Math.log10(high)); power > Math.log10(low); power--) {
    const at = y(10 ** power);
    parts.push(svg("line", { class: "grid", x1: left, x2: right, y1: at, y2: at }));
    const words = `${+(100 * 10 ** power).toPrecision(1)} %`;
    parts.push(svg("text", { x: left - 5, y: at + 4, "text-anchor": "end" }, words));
  }
  for (let direction = 1; direction <= last; direction *= 10) {
    const anchor = x(direction) > right - 12 ? "end" : "middle";
    parts.push(svg("text", { x: x(direction), y: height - 5, "text-anchor": anchor }, String(direction)));
  }
  if (rank) {
    const area = [[left, bottom], ...inside, [edge, bottom]];
    parts.push(svg("path", { d: `${path(area)}Z`, fill: colour, "fill-opacity": 0.35 }));
    parts.push(svg("line", { class: "now", x1: edge, x2: edge, y1: top, y2: bottom }));
  }
  parts.push(svg("path", { d: path(points), fill: "none", stroke: colour, "stroke-width": 2 }));
  parts.push(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  figure.replaceChildren(...parts);
}

function drawLosses(figure, view, ranks, index, methods) {
  const [width, height] = [figure.clientWidth, figure.clientHeight];
  const [left, right, top, bottom] = [SIDES[0], width - SIDES[1], 8, height - 22];
  const x = (i) => left + ((right - left) * i) / Math.max(1, ranks.length - 1);
  const y = (share) => bottom - (bottom - top) * Math.min(1, share);
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    parts.push(svg("line", { class: share ? "grid" : "axis", x1: left, x2: right, y1: y(share), y2: y(share) }));
    parts.push(svg("text", { x: left - 5, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`));
  }
  let before = -Infinity;
  ranks.forEach((rank, i) => {
    const room = 9 * String(rank).length + 8;
    if (i !== index && (x(i) - before < room || Math.abs(x(i) - x(index)) < room)) return;
    before = x(i);
    const kind = i === index ? { class: "here" } : {};
    parts.push(svg("text", { x: x(i), y: height - 6, "text-anchor": "middle", ...kind }, String(rank)));
  });
  parts.push(svg("line", { class: "now", x1: x(index), x2: x(index), y1: top, y2: bottom }));
  for (const { key, colour, dash } of methods) {
    const points = view.left[key].map((share, i) => [x(i), y(share)]);
    const main = key in PAIR;
    const style = { fill: "none", stroke: colour, "stroke-width": main ? 2.6 : 1.5, "stroke-dasharray": dash };
    parts.push(svg("path", { d: path(points), ...style }));
    parts.push(svg("circle", { cx: x(index), cy: points[index][1], r: main ? 4.5 : 3, fill: colour }));
  }
  figure.replaceChildren(...parts);
}

