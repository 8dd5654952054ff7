"""A slider whose name is read out and that shows where the keys are, which those of ipywidgets are and do not."""

import anywidget
import traitlets

# of all controls that stand in `eora-controls`; those of ipywidgets have a thin border at the most
RING = """
.eora-controls :is(button, input, select, textarea):focus-visible {
  outline: 2px solid var(--jp-brand-color1, Highlight) !important; outline-offset: 2px; }
"""


class Slider(anywidget.AnyWidget):
    """A whole number between two ends.

    value, min, max, step: it stays between the ends. description: its name.
    """

    _esm = """
    function render({ model, el }) {
      const [label, input, value] = ["label", "input", "output"].map((tag) => document.createElement(tag));
      label.className = "eora-slider";
      input.type = "range";
      input.dataset.lmSuppressShortcuts = "true"; // JupyterLab would take the arrow keys
      input.setAttribute("aria-label", model.get("description"));
      label.append(model.get("description"), input, value);
      el.append(label);
      const names = ["min", "max", "step", "value"]; // the ends first: the browser keeps a value between them
      const follow = () => {
        for (const name of names) input[name] = model.get(name);
        value.textContent = input.value;
      };
      input.addEventListener("input", () => {
        value.textContent = input.value;
        model.set("value", Number(input.value));
        model.save_changes();
      });
      for (const name of names) model.on(`change:${name}`, follow);
      follow();
      return () => names.forEach((name) => model.off(`change:${name}`, follow));
    }
    export default { render };
    """
    _css = (
        ".eora-slider { display: flex; align-items: center; gap: 0.6em; }\n"
        ".eora-slider input { flex: 0 1 24em; min-width: 6em; accent-color: var(--jp-brand-color1); }\n"
        ".eora-slider output { min-width: 3ch; font-variant-numeric: tabular-nums; }\n" + RING
    )
    description = traitlets.Unicode().tag(sync=True)
    min = traitlets.Int(0).tag(sync=True)
    max = traitlets.Int(100).tag(sync=True)
    step = traitlets.Int(1).tag(sync=True)
    value = traitlets.Int().tag(sync=True)

    @traitlets.validate("value")
    def _between(self, proposal) -> int:
        return min(max(proposal["value"], self.min), self.max)
