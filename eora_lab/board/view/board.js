// The board: the same in a notebook, from a server and in a file.

// host: an element. data: of `data.py`. choice: what the reader chose last time; chose: is handed it when it changes.
// again: reads the store again, where that is not done anyway.
const mount = async (host, data, choice, chose, again) => {
  const DataTable = (await table_module()).default;
  const state = { x: null, y: null, measure: null, baseline: null, cell: null, words: "", hidden: null, ...choice };
  const keep = change => chose({ ...Object.assign(state, change) });
  const choose = change => { keep(change); render(); };
  const picture = picturePart(choose), paired = pairedPart(choose), layers = layersPart();
  const table = tablePart(DataTable, choose, keep);
  const parts = [headPart(again), picture, comparePart(choose), table, paired, layers];
  const charts = [picture, paired, layers];
  const render = (some = parts) => {
    const cells = new Cells(data, state);
    for (const part of some) part.draw(cells);
  };
  host.classList.add("eora-board");
  host.replaceChildren(...parts.map(part => part.section));
  render();
  let width = host.clientWidth;
  new ResizeObserver(() => {
    if (Math.abs(host.clientWidth - width) < 2) return;
    width = host.clientWidth;
    render(charts);
  }).observe(host);
  return { update: fresh => { data = fresh; render(); } };
};
