// Points on two axes, as SVG in the page's colours: by mouse, by keyboard and for screen readers.

const MARKERS = { // by matplotlib's names, in a square of 2 x 2 about 0
  o: "M1 0A1 1 0 1 1-1 0A1 1 0 1 1 1 0Z", s: "M-.85-.85H.85V.85H-.85Z", D: "M0-1.2L1.2 0 0 1.2-1.2 0Z",
  d: "M0-1.3L.8 0 0 1.3-.8 0Z", "^": "M0-1.1L1.1.9H-1.1Z", v: "M0 1.1L1.1-.9H-1.1Z", "<": "M-1.1 0L.9-1.1V1.1Z",
  ">": "M1.1 0L-.9-1.1V1.1Z", P: "M-.4-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",
  X: "M-1-.5L-.5-1 0-.5.5-1 1-.5.5 0 1 .5.5 1 0 .5-.5 1-1 .5-.5 0Z",
  p: "M0-1.1L1.05-.34.65.9H-.65L-1.05-.34Z", h: "M0-1.1L.95-.55V.55L0 1.1-.95.55V-.55Z",
  8: "M-.45-1.05H.45L1.05-.45V.45L.45 1.05H-.45L-1.05.45V-.45Z",
  "*": "M0-1.3L.3-.42 1.24-.4.49.16.76 1.05 0 .52-.76 1.05-.49.16-1.24-.4-.3-.42Z",
};
const LEFT = 62, RIGHT = 18, TOP = 10, BOTTOM = 24, HEIGHT = 320, ROW = 20; // pixels
const SIZE = 5, FINGER = 11, RING = 9, LETTER = 6.6;

// What a look is, in a legend. role: the ring of a "pinned" or "chosen" point in its place.
const sample = ({ colour, marker }, role) => {
  const svg = draw("svg", { width: 20, height: 20, viewBox: "-10 -10 20 20", "aria-hidden": true });
  if (role) draw("circle", { r: RING - 1, class: role }, svg);
  else draw("path", { d: MARKERS[marker] ?? MARKERS.o, transform: `scale(${SIZE})`, fill: colour }, svg);
  return svg;
};

const drawAxes = (svg, { across, down, left, width, height, zero, y }) => {
  const grid = draw("g", { class: "grid", "aria-hidden": true }, svg);
  const floor = height - BOTTOM;
  let last = -Infinity;
  for (const [place, word] of across.marks) {
    if (!across.words) draw("line", { x1: place, x2: place, y1: TOP, y2: floor }, grid);
    const room = word.length * LETTER;
    if (place - room / 2 < last) continue;
    draw("text", { x: place, y: floor + 16, "text-anchor": "middle" }, grid).textContent = word;
    last = place + room / 2 + 4;
  }
  const fits = Math.floor((left - 14) / LETTER);
  for (const [place, word] of down.marks) {
    draw("line", { x1: left, x2: width - RIGHT, y1: place, y2: place }, grid);
    const label = draw("text", { x: left - 8, y: place + 4, "text-anchor": "end" }, grid);
    label.textContent = word.length > fits ? `${word.slice(0, fits - 1)}…` : word;
  }
  if (zero) draw("line", { x1: across.place(0), x2: across.place(0), y1: TOP, y2: floor, class: "zero" }, grid);
  if (!y.name) return;
  const middle = (TOP + floor) / 2;
  const turned = { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` };
  draw("text", turned, grid).textContent = y.name;
};

const drawPoint = (svg, point, across, down, role) => {
  const mark = draw("g", { class: "point", tabindex: -1, role, "aria-label": `${point.name}: ${point.said}` }, svg);
  mark.dataset.id = point.id;
  if (role === "button") mark.setAttribute("aria-pressed", Boolean(point.chosen));
  const cx = across.place(point.x), cy = down.place(point.y), { colour, marker } = point.look;
  const bar = (x1, y1, x2, y2) => draw("line", { x1, y1, x2, y2, stroke: colour, "stroke-width": 1.5 }, mark);
  if (point.x0 != null) bar(across.place(point.x0), cy, across.place(point.x1), cy);
  if (point.y0 != null) bar(cx, down.place(point.y0), cx, down.place(point.y1));
  draw("circle", { cx, cy, r: FINGER, fill: "transparent" }, mark);
  for (const ring of ["pinned", "chosen"]) if (point[ring]) draw("circle", { cx, cy, r: RING, class: ring }, mark);
  const shape = { d: MARKERS[marker] ?? MARKERS.o, transform: `translate(${cx} ${cy}) scale(${SIZE})` };
  draw("path", { ...shape, stroke: colour, "stroke-width": 0.3, fill: point.hollow ? "var(--paper)" : colour }, mark);
  return { mark, cx, cy };
};

// Show a point's name and numbers beside it, while the mouse or the keyboard is on it.
const tell = (tip, point, { mark, cx, cy }, width) => {
  const show = () => {
    tip.replaceChildren(...[point.name, ...point.said.split("; ")].map(text => make("div", { text })));
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(cx + 14, width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(0, cy - tip.offsetHeight - 12)}px`;
  };
  for (const event of ["mouseenter", "focus"]) mark.addEventListener(event, show);
  for (const event of ["mouseleave", "blur"]) mark.addEventListener(event, () => { tip.hidden = true; });
};

// One stop of the tab key for all points; arrows walk from one to the next, Enter picks.
const walk = (svg, marks, order, pick, start) => {
  marks[start]?.setAttribute("tabindex", 0);
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

// Draw points {id, name, said, x, y, x0, x1, y0, y1, look, hollow, pinned, chosen} into a host.
// x, y: {name, log}. rows: y are names, a row each. zero: a line there. says: what is drawn, for those who cannot see
// it. pick: is handed the id of the point that a reader chose.
const chart = (host, { points, x, y, rows, zero, says, pick }) => {
  const active = document.activeElement;
  const kept = host.querySelector("svg")?.contains(active) ? active.dataset.id : null;
  const all = (...keys) => points.flatMap(point => keys.map(key => point[key])).filter(value => value != null);
  const width = Math.max(host.clientWidth || 600, 280);
  const longest = Math.max(0, ...all("y").map(value => typeof value === "string" ? value.length : 0));
  const left = longest ? Math.min(16 + longest * LETTER, width * 0.45) : LEFT;
  const height = rows ? TOP + BOTTOM + ROW * Math.max(new Set(all("y")).size, 2) : HEIGHT;
  const across = scale([...all("x", "x0", "x1"), ...(zero ? [0] : [])], left, width - left - RIGHT, x.log);
  const upward = rows ? all("y").reverse() : all("y", "y0", "y1");
  const down = scale(upward, height - BOTTOM, TOP + BOTTOM - height, y.log);
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": says });
  drawAxes(svg, { across, down, left, width, height, zero, y });
  const tip = make("div", { class: "tip", hidden: true });
  const title = make("div", { class: "axis", text: x.name });
  title.style.paddingLeft = `${left}px`;
  host.replaceChildren(svg, title, tip);
  const right = (a, b) => across.place(a.x) - across.place(b.x), below = (a, b) => down.place(a.y) - down.place(b.y);
  const order = [...points].sort((a, b) => rows ? below(a, b) : right(a, b) || below(b, a));
  const marks = order.map(point => {
    const drawn = drawPoint(svg, point, across, down, pick ? "button" : "img");
    tell(tip, point, drawn, width);
    if (pick) drawn.mark.addEventListener("click", () => pick(point.id));
    return drawn.mark;
  });
  const start = Math.max(0, order.findIndex(point => kept ? point.id === kept : point.chosen));
  walk(svg, marks, order, pick, start);
  if (kept) marks[start]?.focus();
};
