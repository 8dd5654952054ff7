"""Side by side: one prompt, continued by the original model, the compressed one, and that one with each path."""

import html
from collections.abc import Iterable

import ipywidgets

from eora_lab.errors import EoraLabError
from eora_lab.model.generate import generate
from eora_lab.plots import method_name
from eora_lab.run.adapters import OWN, Adapters
from eora_lab.widgets.slider import Slider

ROW = "display: flex; flex-wrap: wrap; gap: 0.6em; line-height: 1.4"
CARD = "border: 1px solid #8888; border-radius: 4px; padding: 0.6em; flex: 1 1 14em; min-width: 0"


class SideBySide(ipywidgets.VBox):
    """A prompt, a button, and what each model makes of it.

    dense:    the uncompressed model. adapters: those of the compressed one; each writes once, and the bare model too.
    own:      the method of the path that the compressed model came with, for its title.
    prompt, tokens, write: the controls. answers: title -> text, of the last prompt.
    """

    def __init__(
        self, tokenizer, dense, adapters: Adapters, own: str = "eora", prompt: str = "The capital of France is"
    ):
        self._tokenizer, self._dense, self._adapters, self._own = tokenizer, dense, adapters, own
        self.prompt = ipywidgets.Textarea(prompt, description="Prompt", rows=2, layout={"width": "min(100%, 46em)"})
        self.tokens = Slider(description="Tokens", min=1, max=256, value=32)
        self.write = ipywidgets.Button(description="Write", icon="play", button_style="primary")
        self.write.tooltip = "Continue the prompt with every model"
        self.status = ipywidgets.HTML()
        self._view = ipywidgets.HTML()
        self.answers: dict[str, str] = {}
        super().__init__([self.prompt, ipywidgets.HBox([self.tokens, self.write, self.status]), self._view])
        self.add_class("eora-controls")
        self.write.on_click(self._write)

    def _write(self, _=None) -> None:
        before, self.write.disabled = self._adapters.active, True
        paths = {"compressed": None} | {self._title(name): name for name in self._adapters.names}
        self.answers = {}
        try:
            for title in ("original", *paths):
                self._show(("original", *paths), f"writing: {title} ...")
                if title in paths:
                    self._adapters.use(paths[title])
                model = self._adapters.model if title in paths else self._dense
                self.answers[title] = generate(model, self._tokenizer, self.prompt.value, self.tokens.value)
            self._show(self.answers, "")
        except EoraLabError as error:
            self._show(self.answers, str(error))
        finally:
            self._adapters.use(before)
            self.write.disabled = False

    def _title(self, name: str) -> str:
        return f"+ {method_name(self._own if name == OWN else name)}"

    def _show(self, titles: Iterable[str], status: str) -> None:
        """A card for each model, in its place from the start, with what it has written so far."""
        self.status.value = html.escape(status)
        cards = "".join(
            f"<section style='{CARD}'><b>{html.escape(title)}</b><div style='white-space: pre-wrap'>"
            f"{html.escape(self.answers.get(title, '...'))}</div></section>"
            for title in titles
        )
        after = f"<p>After “{html.escape(self.prompt.value)}”:</p>" if cards else ""
        self._view.value = f"{after}<div style='{ROW}'>{cards}</div>"
