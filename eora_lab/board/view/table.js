// All cells as a table of DataTables: sorted, filtered, with a button a row that pins it as the baseline.

const SAYS = { search: "Filter", zeroRecords: "No cell has these words", emptyTable: "The store has no cells yet" };
const LAYOUT = { topStart: "info", topEnd: "search", bottomStart: null, bottomEnd: null };

const tablePart = (DataTable, choose, keep) => {
  const holder = make("div", { class: "table" }), columns = make("details", { class: "columns" });
  let grid = null, known = "", cells = null;
  const escaped = value => DataTable.render.text().display(value);

  const pin = row => {
    const pinned = row === cells.pinned;
    const state = { "aria-pressed": String(pinned), disabled: row.status !== "done" };
    const click = event => { event.stopPropagation(); choose({ baseline: row.id }); };
    const label = { "aria-label": `baseline: ${row.name}`, text: pinned ? "●" : "○", "data-pin": row.id };
    return make("button", { type: "button", class: "pin", ...state, ...label, on: { click } });
  };
  const createdRow = (line, row) => {
    line.dataset.id = row.id;
    line.classList.toggle("chosen", row === cells.chosen);
    line.classList.add(cells.status(row));
    line.addEventListener("click", () => choose({ cell: row.id }));
  };
  const visible = one => cells.state.hidden ? !cells.state.hidden.includes(one.key) : !one.hidden;
  const described = () => {
    const state = row => cells.status(row) === "running" ? `running: ${cells.doing(row).doing}` : row.status;
    const shown = one => (row, kind) => {
      const value = row.values[one.key];
      return kind === "sort" || kind === "type" ? value ?? "" : escaped(number(value));
    };
    return [
      { title: "baseline", orderable: false, render: (row, kind) => kind === "display" ? pin(row) : "" },
      { title: "state", render: row => escaped(state(row)) },
      ...cells.columns.map(one => ({ title: escaped(one.name), visible: visible(one), render: shown(one) })),
      ...(cells.failures.length ? [{ title: "reason", render: row => escaped(row.error) }] : []),
    ].map(one => ({ data: null, orderSequence: ["asc", "desc"], ...one }));
  };

  const build = list => {
    const order = (grid?.order() ?? []).filter(([place]) => place < list.length);
    grid?.destroy();
    const id = `board-${Math.random().toString(36).slice(2)}`;
    holder.replaceChildren(make("table", { id, "aria-label": "cells" }));
    grid = new DataTable(holder.firstChild, {
      data: cells.cells, columns: list, order, createdRow,
      layout: LAYOUT, language: SAYS, paging: false, autoWidth: false,
      search: { search: cells.state.words },
      infoCallback: (_, __, ___, all, left) => left === all ? plural(all, "cell") : `${plural(left, "cell")} of ${all}`,
    });
    grid.on("search", () => { if (grid.search() !== cells.state.words) keep({ words: grid.search() }); });
    const words = holder.querySelector("input");
    words.id = holder.querySelector("label").htmlFor = `${id}-words`; // a notebook may have several boards
    words.setAttribute("placeholder", "words, such as: rtn eora");
  };
  const refill = () => {
    const focused = holder.contains(document.activeElement) ? document.activeElement.dataset.pin : null;
    grid.clear().rows.add(cells.cells).draw(false);
    if (focused) holder.querySelector(`[data-pin="${focused}"]`)?.focus();
  };

  const draw = now => {
    cells = now;
    const list = described(), wanted = JSON.stringify(list.map(one => [one.title, one.visible]));
    if (wanted === known) refill();
    else build(list);
    known = wanted;
    const hidden = cells.columns.filter(one => !visible(one)).map(one => one.key);
    const toggled = key => hidden.includes(key) ? hidden.filter(one => one !== key) : [...hidden, key];
    const boxes = cells.columns.map(one => {
      const change = () => choose({ hidden: toggled(one.key) });
      const box = make("input", { type: "checkbox", checked: visible(one), on: { change } });
      return make("label", {}, box, ` ${one.name}`);
    });
    columns.replaceChildren(make("summary", { text: "Columns" }), ...boxes);
  };
  return { section: section("cells", "All cells", columns, holder), draw };
};
