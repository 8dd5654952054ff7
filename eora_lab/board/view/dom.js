// Elements of a page. All texts of a store are put in as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

const make = (tag, { text, on, ...rest } = {}, ...inner) => {
  const one = document.createElement(tag);
  for (const [key, value] of Object.entries(rest)) {
    if (value === false || value == null) continue;
    one.setAttribute(key, value === true ? "" : value);
  }
  if (text != null) one.textContent = text;
  for (const [event, act] of Object.entries(on ?? {})) one.addEventListener(event, act);
  one.append(...inner);
  return one;
};

const draw = (name, attributes, parent) => {
  const one = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
  parent?.append(one);
  return one;
};

// A choice with a label before it. chosen: is handed the new value.
const choice = (label, chosen) => {
  const list = make("select", { "aria-label": label, on: { change: event => chosen(event.target.value) } });
  const holder = make("label", { text: `${label} ` }, list);
  const fill = (options, value) => {
    const wanted = JSON.stringify(options);
    if (list.dataset.options !== wanted) {
      list.replaceChildren(...options.map(([key, text]) => make("option", { value: key, text })));
      list.dataset.options = wanted;
    }
    list.value = value;
  };
  return { holder, fill };
};

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

const listed = words => words.length > 1 ? `${words.slice(0, -1).join(", ")} and ${words.at(-1)}` : words.join("");

// A number with the digits that a reader can use.
const number = value => {
  if (typeof value !== "number") return value ?? "";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value);
  if (size && size < 1e-3) return Number(value.toPrecision(3)).toExponential();
  return size >= 100 ? value.toFixed(1) : size >= 1 ? value.toFixed(2) : String(Number(value.toPrecision(3)));
};

const signed = value => `${value > 0 ? "+" : ""}${number(value)}`;
