// The board: draws what `data.py` computed. It is the same in a notebook, from a server and in a file.
// All texts of a store are put in as text, never as HTML.

const make = (tag, { text, on, ...rest } = {}, ...inner) => {
  const one = document.createElement(tag);
  for (const [key, value] of Object.entries(rest)) if (value !== false && value != null) one.setAttribute(key, value === true ? "" : value);
  if (text != null) one.textContent = text;
  for (const [event, act] of Object.entries(on ?? {})) one.addEventListener(event, act);
  one.append(...inner);
  return one;
};
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const DENSE = { colour: "var(--ink)", marker: "o", name: "dense" };
const STATES = ["done", "running", "waiting", "failed"];

// host: an element. choice: what the reader chose last time. chose: is handed it whenever it changes.
// again: reads the store again, where that is not done anyway.
export const mount = async (host, data, choice, chose, again) => {
  const DataTable = (await table_module()).default;
  host.classList.add("eora-board");
  const state = { x: null, y: null, measure: 0, baseline: null, cell: null, words: "", hidden: null, ...choice };
  const part = (name, title, ...inner) => make("section", { class: name }, ...(title ? [make("h2", { text: title })] : []), ...inner);
  const box = () => make("div", { class: "chart" });
  const head = part("head"), scatter = box(), against = box(), layers = box(), verdict = make("p"), compared = make("div");
  const columns = make("details", { class: "columns" }), holder = make("div", { class: "table" }), legend = make("p", { class: "legend" });
  const select = (label, name) => make("label", { text: `${label} ` }, make("select", { "aria-label": label, on: { change: event => { choose({ [name]: event.target.value }); } } }));
  const x = select("across", "x"), y = select("up", "y"), measure = select("measure", "measure");
  const baseline = select("baseline", "baseline"), chosen = select("with", "cell");
  const cells = part("cells", "All cells", columns, holder), byLayer = part("layers", "Layer by layer", layers);
  const comparison = part("compare", "One cell beside the baseline", make("p", { class: "controls" }, chosen), compared);
  const picture = part("picture", "Any two columns", make("p", { class: "controls" }, x, y), scatter, legend);
  const paired = part("paired", "Against the baseline", make("p", { class: "controls" }, baseline, measure), verdict, against);
  host.replaceChildren(head, picture, comparison, cells, paired, byLayer);
  let grid = null, known = "";

  const doing = one => data.running.find(other => other.id === one.id);
  const status = one => one.status !== "done" && doing(one) ? "running" : one.status;
  const cell = id => data.cells.find(one => one.id === id);
  const column = key => data.columns.find(one => one.key === key);
  const done = () => data.cells.filter(one => one.status === "done");
  const look = one => one.method === "dense" ? DENSE : data.looks[one.method] ?? DENSE;
  const pinned = () => cell(state.baseline)?.status === "done" ? state.baseline : data.baseline;
  const judging = () => data.columns.find(one => one.judges);
  const best = () => { // of the cells that are done, beside the baseline and the dense model
    const sign = judging()?.good === "higher" ? -1 : 1, value = one => sign * one.values[judging().key];
    const rivals = done().filter(one => one.id !== pinned() && one.method !== "dense" && judging() && one.values[judging().key] != null);
    return rivals.reduce((a, b) => !a || value(b) < value(a) ? b : a, null)?.id;
  };
  const shown = () => cell(state.cell) ? state.cell : best() ?? data.cells[0]?.id;
  const choose = change => { Object.assign(state, change); chose({ ...state }); render(); };

  const fill = (label, options, value) => {
    const list = label.querySelector("select"), wanted = JSON.stringify(options);
    if (list.dataset.options !== wanted) {
      list.replaceChildren(...options.map(([key, text]) => make("option", { value: key, text })));
      list.dataset.options = wanted;
    }
    list.value = value;
  };

  // what j has more than i: [difference, low, high], in a table of intervals
  const interval = (table, i, j) => {
    const found = table.pairs.find(([a, b]) => (a === i && b === j) || (a === j && b === i));
    if (!found) return null;
    const [from, , mean, low, high] = found;
    return from === i ? [mean, low, high] : [-mean, -high, -low];
  };
  const sides = table => table.good === "lower" ? ["better", "worse"] : ["worse", "better"];
  const judged = (table, [, low, high]) => low > 0 ? sides(table)[1] : high < 0 ? sides(table)[0] : "undecided";
  const signed = value => `${value > 0 ? "+" : ""}${number(value)}`;

  const drawHead = () => {
    const counts = STATES.map(name => [name, data.cells.filter(one => status(one) === name).length]).filter(([, count]) => count);
    const line = `${plural(data.cells.length, "cell")}: ${counts.map(([name, count]) => `${count} ${name}`).join(", ")}`;
    const { sentence, varied, shared } = data.question;
    const list = (title, lines) => lines.length ? [make("h3", { text: title }), make("ul", {}, ...lines.map(text => make("li", { text })))] : [];
    const bars = data.running.map(one => {
      const time = seconds => new Date(seconds * 1000).toLocaleTimeString(), name = cell(one.id)?.name ?? "a cell that is not shown";
      const bar = make("progress", { max: 1, value: one.share ?? false, "aria-label": name });
      return make("div", { class: "now" }, bar, make("span", { text: ` ${name}: ${one.doing}, since ${time(one.began)} (heard of at ${time(one.heard)})` }));
    });
    const figures = data.figures.map(one => make("img", { alt: one.alt, src: `data:image/svg+xml,${encodeURIComponent(one.svg)}` }));
    const failed = data.failures.map(([reason, count]) => `${plural(count, "cell")}: ${reason}`);
    const goOn = data.goOn.map(([why, command]) => make("div", {}, make("p", { text: why }), make("pre", { text: command })));
    head.replaceChildren(
      make("h1", { text: sentence }),
      make("p", { class: "state", role: "status", text: line }, ...(again ? [" ", make("button", { type: "button", text: "Read the store again", on: { click: again } })] : [])), ...bars,
      ...list("What was found", data.findings), ...figures,
      ...list("The grid", [...varied.map(([name, values]) => `${name}: ${values}`), ...(shared ? [`the same in all: ${shared}`] : [])]),
      ...list("What failed", failed), ...list("What it cost", data.cost),
      ...(goOn.length ? [make("h3", { text: "How to go on" }), ...goOn] : []),
    );
  };

  const drawScatter = () => {
    const options = data.columns.map(one => [one.key, one.name]);
    const judge = judging()?.key ?? data.columns.at(-1)?.key;
    const keys = options.map(([key]) => key), usable = (key, other) => keys.includes(key) ? key : keys.includes(other) ? other : keys[0];
    const [across, up] = [usable(state.x, "bits_per_weight"), usable(state.y, judge)];
    fill(x, options, across);
    fill(y, options, up);
    if (!keys.length) return;
    const [one, other] = [column(across), column(up)];
    const points = done().filter(each => each.values[across] != null && each.values[up] != null).map(each => {
      const [low, high] = each.spread[up] ?? [], [first, last] = each.spread[across] ?? [];
      const said = [one, other].map(axis => `${axis.name} ${number(each.values[axis.key])}`).join("; ");
      return { id: each.id, name: each.name, said, x: each.values[across], y: each.values[up], x0: first, x1: last, y0: low, y1: high,
        look: look(each), pinned: each.id === pinned(), chosen: each.id === shown() };
    });
    const says = `${other.name} against ${one.name}, ${plural(points.length, "cell")}; arrow keys walk through them`;
    const title = axis => axis.good ? `${axis.name} (${axis.good} is better)` : axis.name;
    chart(scatter, { points, x: { name: title(one), log: true }, y: { name: title(other), log: true }, says, pick: id => choose({ cell: id }) });
    const names = [...new Map(done().map(each => [look(each).name, look(each)])).values()];
    legend.replaceChildren(...names.map(each => make("span", {}, key(each), ` ${each.name}`)), ...["pinned", "chosen"].map(role => make("span", {}, key(DENSE, role), role === "pinned" ? " baseline" : " chosen")));
  };

  const key = ({ colour, marker }, role) => {
    const svg = draw("svg", { width: 20, height: 20, viewBox: "-10 -10 20 20", "aria-hidden": true });
    if (role) draw("circle", { r: 8, class: role }, svg);
    else draw("path", { d: MARKERS[marker] ?? MARKERS.o, transform: `scale(${SIZE})`, fill: colour }, svg);
    return svg;
  };

  const drawPaired = () => {
    paired.hidden = !data.intervals.length;
    if (paired.hidden) return;
    const table = data.intervals[state.measure] ?? data.intervals[0], base = data.cells.findIndex(one => one.id === pinned());
    fill(baseline, done().map(one => [one.id, one.name]), pinned());
    fill(measure, data.intervals.map((one, i) => [i, one.name]), data.intervals.indexOf(table));
    const found = data.cells.map((one, j) => [one, j === base ? null : interval(table, base, j)]).filter(([, gap]) => gap);
    const count = word => found.filter(([, gap]) => judged(table, gap) === word).length;
    const name = data.cells[base]?.name ?? "";
    verdict.textContent = found.length
      ? `Of ${plural(found.length, "cell")}, ${count("better")} are better than ${name}, ${count("worse")} worse and ${count("undecided")} undecided (hollow: zero lies in the paired 95 % interval; ${table.n} windows or questions).`
      : `Nothing can be compared with ${name}: it was measured on other windows or questions.`;
    const points = found.map(([one, gap]) => ({ id: one.id, name: one.name, y: one.name, x: gap[0], x0: gap[1], x1: gap[2], look: look(one), chosen: one.id === shown(),
      hollow: judged(table, gap) === "undecided", said: `${signed(gap[0])} [${signed(gap[1])}, ${signed(gap[2])}]; ${judged(table, gap)}` }));
    chart(against, { points, rows: true, zero: true, x: { name: `${table.name}: cell minus baseline (${table.good} is better)` }, y: {}, says: verdict.textContent, pick: id => choose({ cell: id }) });
  };

  const drawTable = () => {
    const list = data.columns.map(one => ({ title: one.name, data: null, type: "board", orderSequence: ["asc", "desc"],
      visible: state.hidden ? !state.hidden.includes(one.key) : !one.hidden || one.axis,
      render: (row, kind) => kind === "sort" || kind === "type" ? row.values[one.key] ?? "" : escaped(number(row.values[one.key])) }));
    const failed = data.cells.some(one => one.error);
    const all = [
      { title: "baseline", data: null, orderable: false, render: (row, kind) => kind === "display" ? pin(row) : "" },
      { title: "state", data: null, render: row => escaped(status(row) === "running" ? `running: ${doing(row).doing}` : row.status) },
      ...list,
      ...(failed ? [{ title: "reason", data: null, render: row => escaped(row.error) }] : []),
    ];
    const wanted = JSON.stringify(all.map(one => [one.title, one.visible]));
    if (wanted !== known) {
      const order = grid?.order() ?? [];
      grid?.destroy();
      holder.replaceChildren(make("table", { "aria-label": "cells" }));
      const layout = { topStart: "info", topEnd: "search", bottomStart: null, bottomEnd: null };
      const language = { search: "Filter", info: "_TOTAL_ cells", infoEmpty: "no cells", infoFiltered: "of _MAX_", zeroRecords: "No cell has these words", emptyTable: "The store has no cells yet" };
      grid = new DataTable(holder.firstChild, { data: data.cells, columns: all, paging: false, order: order.filter(([i]) => i < all.length), layout, language,
        search: { search: state.words }, autoWidth: false, rowId: row => `cell-${row.id}`, createdRow });
      grid.on("search", () => { if (grid.search() !== state.words) { state.words = grid.search(); chose({ ...state }); } });
      holder.querySelector("input")?.setAttribute("placeholder", "words, such as: rtn eora");
      known = wanted;
    } else {
      const focus = holder.contains(document.activeElement) ? document.activeElement.dataset.pin : null;
      grid.clear().rows.add(data.cells).draw(false);
      if (focus) holder.querySelector(`[data-pin="${focus}"]`)?.focus();
    }
    const hidden = list.map((one, i) => one.visible ? null : data.columns[i].key).filter(Boolean);
    const toggle = name => () => choose({ hidden: hidden.includes(name) ? hidden.filter(one => one !== name) : [...hidden, name] });
    columns.replaceChildren(make("summary", { text: "Columns" }), ...data.columns.map(one =>
      make("label", {}, make("input", { type: "checkbox", checked: !hidden.includes(one.key), on: { change: toggle(one.key) } }), ` ${one.name}`)));
  };
  const pin = row => {
    const button = make("button", { type: "button", class: "pin", "data-pin": row.id, "aria-pressed": String(row.id === pinned()), disabled: row.status !== "done", "aria-label": `baseline: ${row.name}`, text: row.id === pinned() ? "●" : "○" });
    button.addEventListener("click", event => { event.stopPropagation(); choose({ baseline: row.id }); });
    return button;
  };
  const createdRow = (line, row) => {
    line.classList.toggle("chosen", row.id === shown());
    line.classList.add(status(row));
    line.addEventListener("click", () => choose({ cell: row.id }));
  };
  const escaped = value => DataTable.render.text().display(value);

  const drawComparison = () => {
    const [a, b] = [cell(pinned()), cell(shown())];
    comparison.hidden = byLayer.hidden = !b;
    if (!b) return;
    fill(chosen, data.cells.map(one => [one.id, one.name]), b.id);
    const both = a && a !== b ? [a, b] : [b];
    const line = (name, values, more = "") => make("tr", {}, make("th", { scope: "row", text: name }), ...values.map(text => make("td", { text })), make("td", { text: more }));
    const rows = data.columns.map(one => line(one.name, both.map(each => number(each.values[one.key]))));
    const order = data.cells.indexOf(a), place = data.cells.indexOf(b);
    if (both.length === 2)
      for (const table of data.intervals) {
        const gap = interval(table, order, place);
        if (gap) rows.push(line(`${table.name}: difference`, ["", signed(gap[0])], `[${signed(gap[1])}, ${signed(gap[2])}], ${judged(table, gap)}`));
      }
    const titles = both.map(one => one === a ? `baseline: ${one.name}` : one.name);
    const top = make("tr", {}, make("th"), ...titles.map(text => make("th", { scope: "col", text })), make("td"));
    const details = Object.entries(b.more).map(([name, text]) => make("details", {}, make("summary", { text: name }), make("pre", { text })));
    compared.replaceChildren(...(b.error ? [make("p", { class: "error", role: "alert", text: b.error })] : []), make("div", { class: "table" }, make("table", { class: "two" }, top, ...rows)), ...details);
    drawLayers(both.filter(one => data.layers[one.id]));
  };

  const drawLayers = both => {
    byLayer.hidden = !both.length;
    if (byLayer.hidden) return;
    const known = both.map(one => data.layers[one.id]), names = data.layerNames[known[0].of];
    const same = both.length === 2 && known[0].of === known[1].of;
    const points = both.flatMap((one, k) => known[k].after.map((after, i) => ({ id: `${i}`, x: i + 1, y: after, hollow: k === 1 && look(one) === look(both[0]), look: look(one), name: data.layerNames[known[k].of][i],
      said: `${one.name}: error ${number(known[k].before[i])}, after its path of rank ${known[k].rank[i]} ${number(after)}${same ? `; ${number(known[1].after[i] / known[0].after[i])} times the baseline's` : ""}` })));
    const better = same ? known[1].after.filter((error, i) => error < known[0].after[i]).length : 0;
    const says = same
      ? `${both[1].name} has the smaller error in ${better} of ${names.length} layers`
      : both.map(one => one.name).join(" and ");
    chart(layers, { points: points.filter(point => point.y > 0), x: { name: "layer, from the first to the last" }, y: { name: "error, share of output energy", log: true }, says });
    const keys = both.map((one, k) => make("span", {}, key({ ...look(one) }), ` ${one.name}${k === 1 && look(one) === look(both[0]) ? " (hollow)" : ""}`));
    layers.prepend(make("p", { class: "legend" }, make("strong", { text: `${says}.` }), ...keys));
  };

  const render = () => {
    drawHead();
    drawScatter();
    drawPaired();
    drawTable();
    drawComparison();
  };
  render();
  let width = host.clientWidth;
  new ResizeObserver(() => {
    if (Math.abs(host.clientWidth - width) < 2) return;
    width = host.clientWidth;
    drawScatter();
    drawPaired();
    drawComparison();
  }).observe(host);
  return { update: fresh => { data = fresh; render(); } };
};
