// The explorable "Seeing EoRA": maps and spectra of a layer, and texts of the model, with one slider of rank under all.
//
// One module for two places. In a notebook, anywidget calls `render` with a model that a kernel answers to. On a page,
// `still` stands for that model: all numbers are there, and nothing answers. The numbers are those of
// eora_lab/measure/layer_view.py; colours and names come with them, from eora_lab/plots/looks.py.

const PATIENCE = 300; // milliseconds at a rank, after which its text is asked for

export function still(state) {
  const heard = {}; // event -> what is to be done
  return {
    get: (name) => state[name],
    set(name, value) {
      state[name] = value;
      (heard[`change:${name}`] ?? []).forEach((act) => act());
    },
    on: (event, act) => (heard[event] ??= []).push(act),
    off() {},
    save_changes() {},
  };
}

function alike(text, original) {
  const [words, wanted] = [text.split(/(?<=\s)(?=\S)/), original.split(/(?<=\s)(?=\S)/)];
  let same = 0;
  while (same < words.length && words[same].trim() === wanted[same]?.trim()) same++;
  return [words.slice(0, same).join(""), words.slice(same).join("")];
}

const name = (words) => html("div", { class: "name" }, words);

function panel({ key, name: title, colour }) {
  const canvas = html("canvas", { role: "img" });
  const spectrum = svg("svg", { role: "img", class: "spectrum" });
  const taken = html("p", { class: "taken" });
  const box = html(
    "section",
    { class: "side", "aria-label": title, style: `--method: ${colour}` },
    name(title),
    canvas,
    html("div", { class: "said" }, `Spectrum: ${PAIR[key][0]}`),
    spectrum,
    taken,
  );
  return { key, title, colour, canvas, spectrum, taken, box };
}

function render({ model, el }) {
  const live = Boolean(model.send);
  const all = model.get("methods");
  const pair = all.filter(({ key }) => key in PAIR);
  const colours = ramp(model.get("colours"));
  const panels = pair.map(panel);

  const headline = html("p", { class: "headline", role: "status" });
  const keys = { "data-lm-suppress-shortcuts": "true" }; // JupyterLab would take the arrow keys from what has them
  const layer = html("select", { ...keys, "aria-label": "Layer" });
  const [least, most] = [html("span"), html("span")];
  const band = html("span", { class: "band", style: `background: linear-gradient(to right, ${model.get("colours")})` });
  const bar = html("span", { class: "bar" }, least, band, most);
  const legend = html("ul", { class: "legend" });
  const losses = svg("svg", { role: "img", class: "losses" });
  const slider = html("input", { ...keys, type: "range", min: 0, step: 1, "aria-label": "Rank" });
  const rankNow = html("output", { class: "rank" });
  const prompt = html(live ? "input" : "select", { ...keys, "aria-label": "Prompt", class: "prompt" });
  const trouble = html("p", { role: "alert", class: "trouble" });
  const texts = pair.map(({ name: title, colour }) => {
    const said = html("p", { class: "written" });
    const about = html("p", { class: "about" });
    const style = `--method: ${colour}`;
    const box = html("section", { style, "aria-label": `${title} writes` }, name(title), said, about);
    return { said, about, box };
  });
  const original = html("p", { class: "written" });
  const dense = html("p", { class: "about" });
  const reading = html(
    "div",
    { class: "reading" },
    html("label", {}, "The model goes on from: ", prompt),
    trouble,
    html("div", { class: "pair texts" }, ...texts.map(({ box }) => box)),
    html("section", { "aria-label": "The original writes" }, name("original"), original, dense),
    html("p", { class: "said" }, "Bold: word for word as the original, from the first word on."),
  );
  const box = html(
    "div",
    { class: "eora-explorable" },
    html("label", {}, "Layer: ", layer),
    headline,
    html("div", { class: "pair" }, ...panels.map((one) => one.box)),
    html("p", { class: "said" }, "Energy of the output error, 1 = mean without compensation: ", bar),
    html("div", { class: "said above" }, "Output error left, against rank"),
    legend,
    losses,
    html("div", { class: "hand" }, slider, rankNow),
    reading,
    html(
      "p",
      { class: "said" },
      "Maps: across, directions of the input, the loudest first, on a logarithmic scale; down, output channels. ",
      "Spectra: the share of the error in each of its directions, the largest first, filled as far as the rank goes.",
    ),
  );
  el.replaceChildren(box);

  const index = () => Math.max(0, model.get("ranks").indexOf(model.get("rank")));
  const written = () => model.get("texts")[model.get("prompt")] ?? {};

  function drawLayer() {
    const [ranks, view, i] = [model.get("ranks"), model.get("views")[model.get("layer")], index()];
    const rank = ranks[i];
    box.setAttribute("aria-busy", String(!view));
    if (!view) {
      headline.textContent = "Solving this layer ...";
      return;
    }
    const [[first, much], [second, little]] = pair.map((one) => [one.name, percent(view.left[one.key][i])]);
    headline.textContent = `At rank ${rank} ${first} leaves ${much} of this layer's output error, ${second} ${little}.`;
    [least.textContent, most.textContent] = view.decades.map((power) => String(10 ** power));
    for (const { key, title, colour, canvas, spectrum, taken } of panels) {
      const left = percent(view.left[key][i]);
      drawMap(canvas, view, key, i, colours);
      canvas.setAttribute("aria-label", `${title}, rank ${rank}: map of the output error, of which ${left} is left`);
      drawSpectrum(spectrum, view, key, Math.min(rank, Math.min(...view.shape)), colour);
      const took = percent(view.taken[key][i]);
      spectrum.setAttribute("aria-label", `${title}: spectrum of the ${PAIR[key][0]}; rank ${rank} takes ${took} of it`);
      taken.textContent = `takes ${took} of the ${PAIR[key][1]} error`;
    }
    const read = all.map(({ key, name }) => `${name} ${percent(view.left[key][i])}`);
    losses.setAttribute("aria-label", `Output error left at rank ${rank}: ${read.join(", ")}`);
    drawLosses(losses, view, ranks, i, all);
    legend.replaceChildren(
      ...all.map(({ colour, dash }, k) => {
        const stroke = { stroke: colour, "stroke-width": 2.4, "stroke-dasharray": dash };
        const line = svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, ...stroke });
        return html("li", {}, svg("svg", { width: 26, height: 10, "aria-hidden": "true" }, line), read[k]);
      }),
    );
  }

  function drawTexts() {
    const [found, i, words] = [written(), index(), model.get("perplexity")];
    const rank = model.get("ranks")[i];
    const missing = live ? "writing ..." : "not written in this run";
    const judged = (name, at) => {
      const value = at === undefined ? words[name]?.[0] : words[name]?.[at];
      return value === undefined ? "" : `perplexity ${value < 100 ? value.toFixed(1) : value.toFixed(0)}`;
    };
    texts.forEach(({ said, about }, k) => {
      const text = found[pair[k].key]?.[i];
      const [same, other] = text == null ? ["", missing] : alike(text, found.original ?? "");
      said.replaceChildren(html("strong", {}, same), other);
      said.classList.toggle("missing", text == null);
      about.textContent = judged(pair[k].key, i);
    });
    original.textContent = found.original ?? missing;
    original.classList.toggle("missing", found.original == null);
    dense.textContent = judged("original");
    trouble.textContent = model.get("problem") ?? "";
    const bits = model.get("path_bits")[i];
    rankNow.textContent = `Rank ${rank}` + (bits === undefined ? "" : ` (+${bits.toFixed(1)} bits a weight)`);
  }

  let timer = 0;
  let asked = false;
  const lacks = () => pair.some(({ key }) => written()[key]?.[index()] == null);
  function ask() {
    clearTimeout(timer);
    if (!live || asked || !model.get("writes") || model.get("problem") || !lacks()) return;
    timer = setTimeout(() => {
      asked = true;
      model.send({ prompt: model.get("prompt"), rank: model.get("rank") });
    }, PATIENCE);
  }

  function choices() {
    const options = (values) => values.map((value) => html("option", { value }, value));
    layer.replaceChildren(...options(live ? model.get("layers") : Object.keys(model.get("views"))));
    layer.value = model.get("layer");
    if (!live) prompt.replaceChildren(...options(Object.keys(model.get("texts"))));
    prompt.value = model.get("prompt");
    slider.max = model.get("ranks").length - 1;
    reading.hidden = live ? !model.get("writes") : !Object.keys(model.get("texts")).length;
  }
  function move() {
    slider.value = index();
    slider.setAttribute("aria-valuetext", `rank ${model.get("ranks")[index()]}`);
    drawLayer();
    drawTexts();
    ask();
  }
  function change(name, value) {
    model.set(name, value);
    model.save_changes();
  }

  slider.addEventListener("input", () => change("rank", model.get("ranks")[slider.value]));
  layer.addEventListener("change", () => change("layer", layer.value));
  const begin = () => {
    if (prompt.value === model.get("prompt")) return;
    model.set("problem", "");
    change("prompt", prompt.value);
  };
  prompt.addEventListener("change", begin);
  prompt.addEventListener("keydown", (event) => event.key === "Enter" && begin());
  const point = (event) => {
    const track = losses.clientWidth - SIDES[0] - SIDES[1];
    const at = (event.clientX - losses.getBoundingClientRect().left - SIDES[0]) / track;
    const last = model.get("ranks").length - 1;
    change("rank", model.get("ranks")[Math.round(Math.min(1, Math.max(0, at)) * last)]);
  };
  losses.addEventListener("pointerdown", point);
  losses.addEventListener("pointermove", (event) => event.buttons === 1 && point(event));

  const heard = {
    "change:rank": move,
    "change:layer": () => (choices(), drawLayer()),
    "change:views": drawLayer,
    "change:prompt": () => (choices(), move()),
    "change:texts": drawTexts,
    "change:problem": drawTexts,
    "msg:custom": () => ((asked = false), ask()), // the kernel has done what it was asked for
  };
  for (const [event, act] of Object.entries(heard)) model.on(event, act);
  const sizes = new ResizeObserver(drawLayer);
  sizes.observe(box);
  choices();
  move();
  return () => {
    clearTimeout(timer);
    sizes.disconnect();
    for (const [event, act] of Object.entries(heard)) model.off(event, act);
  };
}

export default { render };
