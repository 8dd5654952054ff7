// What the parts of a board ask of its data (`data.py`) and of what the reader chose.

const DENSE = { colour: "var(--ink)", marker: "o", name: "dense" };
const STATES = ["done", "running", "waiting", "failed"];

class Cells {
  constructor(data, state) {
    Object.assign(this, data);
    this.state = state;
  }

  of(id) { return this.cells.find(one => one.id === id); }

  column(key) { return this.columns.find(one => one.key === key); }

  get done() { return this.cells.filter(one => one.status === "done"); }

  // The column that says how good a cell is.
  get judge() { return this.columns.find(one => one.judges); }

  look(cell) { return this.looks[cell.method] ?? DENSE; }

  // What a cell is doing, if it runs.
  doing(cell) { return this.running.find(one => one.id === cell.id); }

  status(cell) { return cell.status !== "done" && this.doing(cell) ? "running" : cell.status; }

  // The cell that others are compared with, as long as it is there.
  get pinned() { return [this.of(this.state.baseline), this.of(this.baseline)].find(one => one?.status === "done"); }

  // The cell that is shown beside it: the best one until the reader chooses.
  get chosen() { return this.of(this.state.cell) ?? this.best ?? this.cells[0]; }

  get best() {
    const judge = this.judge, sign = judge?.good === "higher" ? -1 : 1;
    const value = one => judge ? one.values[judge.key] : null;
    const rivals = this.done.filter(one => one !== this.pinned && one.method !== "dense" && value(one) != null);
    return rivals.reduce((a, b) => !a || sign * value(b) < sign * value(a) ? b : a, null);
  }

  // What `other` has more than `one` in a table of paired intervals: {mean, low, high, verdict}, or null.
  gap(table, one, other) {
    const [i, j] = [this.cells.indexOf(one), this.cells.indexOf(other)];
    const found = table.pairs.find(([a, b]) => (a === i && b === j) || (a === j && b === i));
    if (!found) return null;
    const [from, , difference, least, most] = found;
    const [mean, low, high] = from === i ? [difference, least, most] : [-difference, -most, -least];
    const [below, above] = table.good === "lower" ? ["better", "worse"] : ["worse", "better"];
    const verdict = low > 0 ? above : high < 0 ? below : "undecided";
    const said = `${signed(mean)} [${signed(low)}, ${signed(high)}]; ${verdict}`;
    return { cell: other, mean, low, high, verdict, said };
  }

  // Every cell against the pinned one: [gap, ...].
  gaps(table) { return this.cells.map(cell => this.gap(table, this.pinned, cell)).filter(Boolean); }

  // How many are better, worse and undecided, in words.
  tally(gaps) {
    const count = word => gaps.filter(gap => gap.verdict === word).length;
    return listed(["better", "worse", "undecided"].map(word => `${count(word)} ${word}`));
  }
}
