// Points on two axes, as SVG that follows the page's colours: by mouse, by keyboard and for screen readers.

const SVG = "http://www.w3.org/2000/svg";
const MARKERS = { // in a square of 2 x 2 about 0
  o: "M1 0A1 1 0 1 1-1 0A1 1 0 1 1 1 0Z", s: "M-.85-.85H.85V.85H-.85Z", D: "M0-1.2L1.2 0 0 1.2-1.2 0Z",
  d: "M0-1.3L.8 0 0 1.3-.8 0Z", "^": "M0-1.1L1.1.9H-1.1Z", v: "M0 1.1L1.1-.9H-1.1Z", "<": "M-1.1 0L.9-1.1V1.1Z",
  ">": "M1.1 0L-.9-1.1V1.1Z", P: "M-.4-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",
  X: "M-1-.5L-.5-1 0-.5.5-1 1-.5.5 0 1 .5.5 1 0 .5-.5 1-1 .5-.5 0Z",
  p: "M0-1.1L1.05-.34.65.9H-.65L-1.05-.34Z", h: "M0-1.1L.95-.55V.55L0 1.1-.95.55V-.55Z",
  "8": "M-.45-1.05H.45L1.05-.45V.45L.45 1.05H-.45L-1.05.45V-.45Z",
  "*": "M0-1.3L.3-.42 1.24-.4.49.16.76 1.05 0 .52-.76 1.05-.49.16-1.24-.4-.3-.42Z",
};
const LEFT = 62, RIGHT = 18, TOP = 10, BOTTOM = 24, SIZE = 5, ROW = 20, LETTER = 6.6; // pixels

// A number with the digits that a reader can use.
export const number = value => {
  if (typeof value !== "number") return value ?? "";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value);
  if (size && size < 1e-3) return Number(value.toPrecision(3)).toExponential();
  return size >= 100 ? value.toFixed(1) : size >= 1 ? value.toFixed(2) : String(Number(value.toPrecision(3)));
};

const draw = (name, attributes, parent) => {
  const one = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
  parent?.append(one);
  return one;
};

// Round numbers between low and high: at steps of 1, 2 or 5 times a power of ten; on a logarithmic axis those themselves.
const ticks = (low, high, log) => {
  const found = [];
  if (log) {
    const leaves = high / low > 60 ? [1] : high / low > 8 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 7];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const leaf of leaves) found.push(leaf * 10 ** power);
  }
  const inside = found.filter(tick => tick >= low * 0.999 && tick <= high * 1.001);
  if (inside.length >= 2) return inside;
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(leaf => leaf * power >= rough) * power;
  const even = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) even.push(Number((k * step).toPrecision(12)));
  return even;
};

// Where values stand: words side by side, numbers at themselves. size: in pixels, from start.
const scale = (values, start, size, log) => {
  const numbers = values.filter(value => typeof value === "number");
  if (numbers.length < values.length || !values.length) {
    const words = [...new Set(values)];
    const place = value => start + size * (words.indexOf(value) + 0.5) / Math.max(words.length, 1);
    return { place, marks: words.map(word => [place(word), String(word)]), words: true };
  }
  let low = Math.min(...numbers), high = Math.max(...numbers);
  const spread = log && low > 0 && high > 3 * low;
  if (low === high) [low, high] = low ? [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1] : [-1, 1];
  const warp = spread ? Math.log : value => value;
  const margin = 0.05 * (warp(high) - warp(low)), from = warp(low) - margin, to = warp(high) + margin;
  const place = value => start + size * (warp(value) - from) / (to - from);
  const marks = ticks(low, high, spread).map(tick => [place(tick), number(tick)]);
  return { place, marks, words: false };
};

// Draw points {x, y, x0, x1, y0, y1, look, name, said, hollow, pinned, chosen, id} into a host, and return nothing.
// x, y: {name, log}. zero: a line there. says: for those who cannot see it. pick: is handed a point's id.
export const chart = (host, { points, x, y, zero, says, pick, rows }) => {
  const kept = host.querySelector("svg")?.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  host.replaceChildren();
  const longest = Math.max(0, ...points.map(point => typeof point.y === "string" ? point.y.length : 0));
  const left = longest ? Math.min(16 + longest * LETTER, host.clientWidth * 0.45) : LEFT;
  const width = Math.max(host.clientWidth || 600, 280);
  const height = rows ? TOP + BOTTOM + ROW * Math.max(new Set(points.map(point => point.y)).size, 2) : 320;
  const wide = width - left - RIGHT, high = height - TOP - BOTTOM;
  const all = (...keys) => points.flatMap(point => keys.map(key => point[key])).filter(value => value != null);
  const across = scale([...all("x", "x0", "x1"), ...(zero ? [0] : [])], left, wide, x.log);
  const down = scale(rows ? [...all("y")].reverse() : all("y", "y0", "y1"), height - BOTTOM, -high, y.log);
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": says }, host);
  const grid = draw("g", { class: "grid", "aria-hidden": true }, svg);
  let last = -Infinity;
  for (const [place, word] of across.marks) {
    if (!across.words) draw("line", { x1: place, x2: place, y1: TOP, y2: height - BOTTOM }, grid);
    const room = word.length * LETTER;
    if (place - room / 2 < last) continue;
    draw("text", { x: place, y: height - BOTTOM + 16, "text-anchor": "middle" }, grid).textContent = word;
    last = place + room / 2 + 4;
  }
  for (const [place, word] of down.marks) {
    draw("line", { x1: left, x2: width - RIGHT, y1: place, y2: place }, grid);
    const fits = Math.floor((left - 14) / LETTER);
    const label = draw("text", { x: left - 8, y: place + 4, "text-anchor": "end" }, grid);
    label.textContent = word.length > fits ? `${word.slice(0, fits - 1)}…` : word;
  }
  if (zero) draw("line", { x1: across.place(0), x2: across.place(0), y1: TOP, y2: height - BOTTOM, class: "zero" }, grid);
  const title = Object.assign(document.createElement("div"), { className: "axis", textContent: x.name });
  title.style.paddingLeft = `${left}px`;
  if (!rows) {
    const place = { x: 12, y: TOP + high / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${TOP + high / 2})` };
    draw("text", place, grid).textContent = y.name;
  }
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  host.append(title, tip);
  const order = [...points].sort((a, b) => across.place(a.x) - across.place(b.x) || down.place(b.y) - down.place(a.y));
  if (rows) order.sort((a, b) => down.place(a.y) - down.place(b.y));
  const marks = order.map(point => {
    const mark = draw("g", { class: "point", tabindex: -1, role: pick ? "button" : "img", "aria-label": `${point.name}: ${point.said}` }, svg);
    mark.dataset.id = point.id;
    if (pick) mark.setAttribute("aria-pressed", Boolean(point.chosen));
    const cx = across.place(point.x), cy = down.place(point.y), { colour, marker } = point.look;
    const bar = (x1, y1, x2, y2) => draw("line", { x1, y1, x2, y2, stroke: colour, "stroke-width": 1.5 }, mark);
    if (point.x0 != null) bar(across.place(point.x0), cy, across.place(point.x1), cy);
    if (point.y0 != null) bar(cx, down.place(point.y0), cx, down.place(point.y1));
    draw("circle", { cx, cy, r: 11, fill: "transparent" }, mark); // room for a finger
    if (point.pinned || point.chosen) draw("circle", { cx, cy, r: 9, class: point.pinned ? "pinned" : "chosen" }, mark);
    const shape = MARKERS[marker] ?? MARKERS.o;
    const style = point.hollow ? { fill: "var(--paper)", stroke: colour } : { fill: colour, stroke: colour };
    draw("path", { d: shape, transform: `translate(${cx} ${cy}) scale(${SIZE})`, "stroke-width": 0.3, ...style }, mark);
    const show = () => {
      tip.replaceChildren(...[point.name, ...point.said.split("; ")].map(line => Object.assign(document.createElement("div"), { textContent: line })));
      tip.hidden = false;
      tip.style.left = `${Math.max(4, Math.min(cx + 14, width - tip.offsetWidth - 4))}px`;
      tip.style.top = `${Math.max(0, cy - tip.offsetHeight - 12)}px`;
    };
    mark.addEventListener("mouseenter", show);
    mark.addEventListener("focus", show);
    mark.addEventListener("mouseleave", () => { tip.hidden = true; });
    mark.addEventListener("blur", () => { tip.hidden = true; });
    if (pick) mark.addEventListener("click", () => pick(point.id));
    return mark;
  });
  // one stop of the tab key; arrows walk from point to point
  const start = Math.max(0, order.findIndex(point => point.id === kept || (!kept && point.chosen)));
  marks[start]?.setAttribute("tabindex", 0);
  if (kept) marks[start]?.focus();
  svg.addEventListener("keydown", event => {
    const here = marks.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (here < 0 || (!step && event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    event.stopPropagation(); // JupyterLab has its own keys
    if (!step) return pick?.(order[here].id);
    const next = marks[here + step];
    if (!next) return;
    marks[here].setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  });
};
