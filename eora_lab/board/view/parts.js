// The parts of a board. Each is {section, draw}: draw is handed `Cells` and shows them as they are now.

const section = (name, title, ...inner) =>
  make("section", { class: name }, ...(title ? [make("h2", { text: title })] : []), ...inner);

// The question, how far its answer is, what was found, what it cost, and how to go on. again: reads the store again.
const headPart = again => {
  const holder = section("head");
  const list = (title, lines) => {
    const items = lines.map(text => make("li", { text }));
    return lines.length ? [make("h3", { text: title }), make("ul", {}, ...items)] : [];
  };
  const time = seconds => new Date(seconds * 1000).toLocaleTimeString();
  const state = cells => {
    const counts = STATES.map(name => [name, cells.cells.filter(one => cells.status(one) === name).length]);
    const told = counts.filter(([, count]) => count).map(([name, count]) => `${count} ${name}`).join(", ");
    const button = again && make("button", { type: "button", text: "Read the store again", on: { click: again } });
    const text = `${plural(cells.cells.length, "cell")}: ${told}`;
    return make("p", { class: "state" }, make("span", { role: "status", text }), ...(button ? [" ", button] : []));
  };
  const bar = (cells, one) => {
    const name = cells.of(one.id)?.name ?? one.name;
    const text = `${name}: ${one.doing}, since ${time(one.began)} (heard of at ${time(one.heard)})`;
    const drawn = make("progress", { max: 1, value: one.share, "aria-label": name });
    return make("div", { class: "now" }, drawn, make("span", { text }));
  };
  const decided = cells => cells.intervals.map(table => {
    const gaps = cells.gaps(table), open = gaps.filter(gap => gap.verdict === "undecided").map(gap => gap.cell.name);
    return `${table.name}: ${cells.tally(gaps)}${open.length ? ` (${open.join("; ")})` : ""}`;
  });
  const draw = cells => {
    const { sentence, varied, shared } = cells.question;
    const grid = varied.map(([name, values]) => `${name}: ${values}`);
    if (shared) grid.push(`the same in all: ${shared}`);
    const source = svg => `data:image/svg+xml,${encodeURIComponent(svg)}`;
    const goOn = cells.goOn.flatMap(([text, command]) => [make("p", { text }), make("pre", { text: command })]);
    holder.replaceChildren(
      make("h1", { text: sentence }),
      state(cells),
      ...cells.running.map(one => bar(cells, one)),
      ...list("What was found", cells.findings),
      ...cells.figures.map(one => make("img", { alt: one.alt, src: source(one.svg) })),
      ...(cells.pinned ? list(`Decided against ${cells.pinned.name}, by paired 95 % intervals`, decided(cells)) : []),
      ...list("The grid", grid),
      ...list("What failed", cells.failures.map(([reason, count]) => `${plural(count, "cell")}: ${reason}`)),
      ...list("What it cost", cells.cost),
      ...(goOn.length ? [make("h3", { text: "How to go on" }), ...goOn] : []),
    );
  };
  return { section: holder, draw };
};

// Any two columns against each other, a point a cell.
const picturePart = choose => {
  const x = choice("across", key => choose({ x: key })), y = choice("up", key => choose({ y: key }));
  const host = make("div", { class: "chart" }), legend = make("p", { class: "legend" });
  const controls = make("p", { class: "controls" }, x.holder, y.holder);
  const title = column => column.good ? `${column.name} (${column.good} is better)` : column.name;
  const draw = cells => {
    const options = cells.columns.map(one => [one.key, one.name]);
    const one = cells.column(cells.state.x) ?? cells.column("bits_per_weight") ?? cells.columns[0];
    const other = cells.column(cells.state.y) ?? cells.judge ?? cells.columns.at(-1);
    if (!one) return;
    x.fill(options, one.key);
    y.fill(options, other.key);
    const drawn = cells.done.filter(cell => cell.values[one.key] != null && cell.values[other.key] != null);
    const points = drawn.map(cell => {
      const [[x0, x1], [y0, y1]] = [one, other].map(column => cell.spread[column.key] ?? []);
      const said = [one, other].map(column => `${column.name} ${number(cell.values[column.key])}`).join("; ");
      const rings = { pinned: cell === cells.pinned, chosen: cell === cells.chosen };
      const place = { x: cell.values[one.key], y: cell.values[other.key], x0, x1, y0, y1 };
      return { id: cell.id, name: cell.name, said, look: cells.look(cell), ...place, ...rings };
    });
    const says = `${other.name} against ${one.name}, ${plural(points.length, "cell")}; arrow keys walk through them`;
    const axes = { x: { name: title(one), log: true }, y: { name: title(other), log: true } };
    chart(host, { points, ...axes, says, pick: id => choose({ cell: id }) });
    const looks = [...new Map(drawn.map(cell => [cells.look(cell).name, cells.look(cell)])).values()];
    const rings = [["pinned", "baseline"], ["chosen", "chosen"]];
    legend.replaceChildren(
      ...looks.map(look => make("span", {}, sample(look), ` ${look.name}`)),
      ...rings.map(([role, name]) => make("span", {}, sample(DENSE, role), ` ${name}`)),
    );
  };
  return { section: section("picture", "Any two columns", controls, host, legend), draw };
};

// Every cell against the baseline, with paired intervals.
const pairedPart = choose => {
  const baseline = choice("baseline", id => choose({ baseline: id }));
  const measure = choice("measure", name => choose({ measure: name }));
  const verdict = make("p"), host = make("div", { class: "chart" });
  const controls = make("p", { class: "controls" }, baseline.holder, measure.holder);
  const holder = section("paired", "Against the baseline", controls, verdict, host);
  const draw = cells => {
    const base = cells.pinned, [first] = cells.intervals;
    const table = cells.intervals.find(one => one.name === cells.state.measure) ?? first;
    holder.hidden = !base || !table;
    if (holder.hidden) return;
    baseline.fill(cells.done.map(one => [one.id, one.name]), base.id);
    measure.fill(cells.intervals.map(one => [one.name, one.name]), table.name);
    const found = cells.gaps(table);
    verdict.textContent = found.length
      ? `Of ${plural(found.length, "cell")} against ${base.name}: ${cells.tally(found)} (hollow: zero lies in the ` +
        `paired 95 % interval; ${table.n} windows or questions).`
      : `Nothing can be compared with ${base.name}: it was measured on other windows or questions.`;
    const points = found.map(({ cell, mean, low, high, verdict: word, said }) => {
      const place = { x: mean, x0: low, x1: high, y: cell.name, look: cells.look(cell) };
      const { id, name } = cell;
      return { id, name, said, ...place, hollow: word === "undecided", chosen: cell === cells.chosen };
    });
    const x = { name: `${table.name}: cell minus baseline (${table.good} is better)` };
    const says = verdict.textContent, pick = id => choose({ cell: id });
    chart(host, { points, rows: true, zero: true, x, y: {}, says, pick });
  };
  return { section: holder, draw };
};

// One cell beside the baseline: what was set, measured, and how sure the difference is.
const comparePart = choose => {
  const other = choice("with", id => choose({ cell: id })), content = make("div");
  const controls = make("p", { class: "controls" }, other.holder);
  const holder = section("compare", "One cell beside the baseline", controls, content);
  const line = (name, values, more = "") => {
    const data = [...values, more].map(text => make("td", { text }));
    return make("tr", {}, make("th", { scope: "row", text: name }), ...data);
  };
  const draw = cells => {
    const cell = cells.chosen, base = cells.pinned;
    holder.hidden = !cell;
    if (!cell) return;
    other.fill(cells.cells.map(one => [one.id, one.name]), cell.id);
    const both = base && base !== cell ? [base, cell] : [cell];
    const titles = both.map(one => one === base ? `baseline: ${one.name}` : one.name);
    const top = titles.map(text => make("th", { scope: "col", text }));
    const rows = cells.columns.map(one => line(one.name, both.map(each => number(each.values[one.key]))));
    for (const table of both.length === 2 ? cells.intervals : []) {
      const gap = cells.gap(table, base, cell);
      const within = gap && `[${signed(gap.low)}, ${signed(gap.high)}], ${gap.verdict}`;
      if (gap) rows.push(line(`${table.name}: difference`, ["", signed(gap.mean)], within));
    }
    const table = make("table", { class: "two" }, make("tr", {}, make("td"), ...top, make("td")), ...rows);
    const texts = Object.entries(cell.more);
    content.replaceChildren(
      ...(cell.error ? [make("p", { class: "error", role: "alert", text: cell.error })] : []),
      make("div", { class: "table" }, table),
      ...texts.map(([name, text]) => make("details", {}, make("summary", { text: name }), make("pre", { text }))),
    );
  };
  return { section: holder, draw };
};

// The same two, layer by layer.
const layersPart = () => {
  const legend = make("p", { class: "legend" }), host = make("div", { class: "chart" });
  const holder = section("layers", "Layer by layer", legend, host);
  const draw = cells => {
    const both = [...new Set([cells.pinned, cells.chosen])].filter(one => one && cells.layers[one.id]);
    holder.hidden = !both.length;
    if (holder.hidden) return;
    const [first, second] = both.map(one => cells.layers[one.id]);
    const same = second && first.of === second.of;
    const hollow = cell => cell !== both[0] && cells.look(cell) === cells.look(both[0]); // where looks are the same
    const points = both.flatMap(cell => {
      const { of, rank, before, after } = cells.layers[cell.id];
      return after.map((error, i) => {
        const ratio = same ? `; ${number(second.after[i] / first.after[i])} times the baseline's` : "";
        const ranked = `after its path of rank ${rank[i]} ${number(error)}`;
        const said = `${cell.name}: error ${number(before[i])}, ${ranked}${ratio}`;
        const place = { x: i + 1, y: error, look: cells.look(cell), hollow: hollow(cell) };
        return { id: `${cell.id} ${i}`, name: cells.layerNames[of][i], said, ...place };
      });
    });
    const fewer = same ? second.after.filter((error, i) => error < first.after[i]).length : 0;
    const says = same
      ? `${both[1].name} has the smaller error in ${fewer} of ${second.after.length} layers`
      : both.map(one => one.name).join(" and ");
    const x = { name: "layer, from the first to the last" }, y = { name: "error, share of output energy", log: true };
    chart(host, { points: points.filter(point => point.y > 0), x, y, says });
    const name = cell => ` ${cell.name}${hollow(cell) ? " (hollow)" : ""}`;
    const keys = both.map(cell => make("span", {}, sample(cells.look(cell)), name(cell)));
    legend.replaceChildren(make("strong", { text: `${says}.` }), ...keys);
  };
  return { section: holder, draw };
};
