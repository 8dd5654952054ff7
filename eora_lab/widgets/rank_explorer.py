"""Seeing EoRA: maps and spectra of a layer, and what the whole model writes, with one slider of rank under all."""

from collections.abc import Sequence
from typing import Any

import anywidget
import traitlets
from torch import nn

from eora_lab.errors import EoraLabError
from eora_lab.measure.at_rank import AtRank
from eora_lab.measure.explore import Exploration
from eora_lab.measure.layer_view import PAIR, layer_view, rank_stops
from eora_lab.model.generate import generate
from eora_lab.plots.explorable import MODULE, SHEET, colours, drawn

METHODS = ("svd", "act_s", "qera_approx", "eora")


class RankExplorer(anywidget.AnyWidget):
    """What every rank of SVD and EoRA leaves of a layer's error, side by side, and what the model writes with it.

    A layer is solved when it is first looked at, and sent to the browser at all ranks: the slider asks nobody. Texts
    are written when the slider rests at a rank, after all layers were solved once.

    exploration: of `model`. model, tokenizer: without them there are no texts. tokens: of a text, 0 for none.
    methods: curves that are drawn.
    layer, rank, prompt: what is looked at; a rank that has no stop becomes the nearest one.
    texts: prompt -> "original" and methods -> what they wrote, at every rank of `ranks`, None where they have not.
    problem: why there is no text.
    Raises EoraLabError for an unknown layer or method.
    """

    _esm, _css = MODULE, SHEET
    methods: traitlets.List = traitlets.List().tag(sync=True)
    colours: traitlets.List = traitlets.List().tag(sync=True)
    layers: traitlets.List = traitlets.List().tag(sync=True)
    ranks: traitlets.List = traitlets.List().tag(sync=True)
    views = traitlets.Dict().tag(sync=True)
    texts = traitlets.Dict().tag(sync=True)
    perplexity = traitlets.Dict().tag(sync=True)  # of the page alone: it would take minutes
    path_bits: traitlets.List = traitlets.List().tag(sync=True)
    writes = traitlets.Bool().tag(sync=True)
    problem = traitlets.Unicode().tag(sync=True)
    layer = traitlets.Unicode().tag(sync=True)
    rank = traitlets.Int().tag(sync=True)
    prompt = traitlets.Unicode().tag(sync=True)

    def __init__(
        self,
        exploration: Exploration,
        model: nn.Module | None = None,
        tokenizer=None,
        *,
        layer: str | None = None,
        rank: int = 32,
        prompt: str = "The best way to learn a new language is to",
        tokens: int = 32,
        methods: Sequence[str] = METHODS,
    ):
        self._exploration, self._dense, self._tokenizer, self._tokens = exploration, model, tokenizer, tokens
        self._whole = AtRank(model, exploration) if model is not None and tokens else None
        layers = exploration.layers
        super().__init__(
            methods=drawn(methods),
            colours=colours(),
            layers=layers,
            ranks=rank_stops(max(map(exploration.highest, layers))),
            writes=self._whole is not None,
        )
        if self._whole:
            self.path_bits = [self._whole.path_bits(one) for one in self.ranks]
        self.rank, self.prompt = rank, prompt
        self.layer = layers[0] if layer is None else layer
        if self._whole:
            self._write(self.prompt, self.rank)
        self.on_msg(self._asked)

    @traitlets.validate("rank")
    def _proposed(self, proposal) -> int:
        return self._stop(proposal["value"])

    def _stop(self, rank: int) -> int:
        """The nearest rank that the slider stops at."""
        return min(self.ranks, key=lambda stop: abs(stop - rank))

    @traitlets.observe("layer")
    def _look(self, _=None) -> None:
        if self.layer not in self.views:
            methods = [one["key"] for one in self.methods]
            self.views = {**self.views, self.layer: layer_view(self._exploration, self.layer, methods, self.ranks)}

    def _asked(self, _, content: dict, __) -> None:
        """The slider rests at a rank whose text is not written yet."""
        try:
            self._write(content["prompt"], self._stop(content["rank"]))
        finally:
            self.send({"done": True})

    def _write(self, prompt: str, rank: int) -> None:
        """Let the original and the pair go on from a prompt, as far as they have not."""
        assert self._whole is not None
        place = self.ranks.index(rank)
        found: dict[str, Any] = {**self.texts.get(prompt, {})}
        self.problem = ""
        try:
            if "original" not in found:
                found["original"] = generate(self._dense, self._tokenizer, prompt, self._tokens)
            for method in PAIR:
                found[method] = wrote = [*found.get(method, [None] * len(self.ranks))]
                if wrote[place] is None:
                    wrote[place] = generate(self._whole.model(method, rank), self._tokenizer, prompt, self._tokens)
        except EoraLabError as error:
            self.problem = str(error)
            return
        self.texts = {**self.texts, prompt: found}
