"""Side by side: one prompt, continued by the dense model, the compressed one, and the compressed one with each path."""

import html

import ipywidgets

from eora_lab.errors import EoraLabError
from eora_lab.model.generate import generate
from eora_lab.plots import method_name
from eora_lab.run.adapters import OFF, Adapters


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
        self.tokens = ipywidgets.IntSlider(32, min=1, max=256, description="Tokens")
        self.write = ipywidgets.Button(description="Write", icon="play", button_style="primary")
        self.write.tooltip = "Continue the prompt with every model"
        self.status = ipywidgets.HTML()
        self._view = ipywidgets.HTML()
        self.answers: dict[str, str] = {}
        super().__init__([self.prompt, ipywidgets.HBox([self.tokens, self.write, self.status]), self._view])
        self.write.on_click(self._write)

    def _write(self, _=None) -> None:
        self.answers, before = {}, self._adapters.active
        self.write.disabled = True
        try:
            self._answer("dense", self._dense)
            for name in (None, *self._adapters.names):
                self._adapters.use(name)
                title = self._own if name == "own" else name or OFF
                self._answer("compressed" if name is None else f"+ {method_name(title)}", self._adapters.model)
            self.status.value = ""
        except EoraLabError as error:
            self.status.value = html.escape(str(error))
        finally:
            self._adapters.use(before)
            self.write.disabled = False

    def _answer(self, title: str, model) -> None:
        self.status.value = f"writing: {html.escape(title)} ..."
        self.answers[title] = generate(model, self._tokenizer, self.prompt.value, self.tokens.value)
        cell = "border: 1px solid #8888; border-radius: 4px; padding: 0.6em; flex: 1 1 14em; min-width: 0"
        self._view.value = "".join(
            ["<div style='display: flex; flex-wrap: wrap; gap: 0.6em; line-height: 1.4'>"]
            + [
                f"<section style='{cell}'><b>{html.escape(title)}</b><div style='white-space: pre-wrap'>"
                f"{html.escape(text)}</div></section>"
                for title, text in self.answers.items()
            ]
            + ["</div>"]
        )
