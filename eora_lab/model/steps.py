"""One token after another as one CUDA graph: what a GPU's host would launch hundreds of times, launched once a token.

On any other device the same steps are called one by one, which is what tests compare.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from eora_lab.errors import EoraLabError, one_line


def can_capture(model: nn.Module) -> bool:
    """Whether `Steps` may be captured: a model on one GPU that transformers calls fit for it, all of whose compressed
    layers are computed by the kernels there (torch's way unpacks, and asks the host)."""
    devices = {tensor.device for tensor in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type != "cuda" or not getattr(model, "_can_compile_fullgraph", False):
        return False
    return all(one.backend_for(1) == "triton" for one in model.modules() if hasattr(one, "backend_for"))  # type: ignore[operator]


class Steps:
    """A model that has read prompts, and now takes one token of each text at a time.

    ids:   (texts, tokens), prompts that end together; mask: which of these tokens are theirs.
    more:  tokens that will come at the most.
    Raises EoraLabError for a model whose layers do not all look at the whole text.
    """

    def __init__(self, model, ids: Int[Tensor, "texts tokens"], mask: Bool[Tensor, "texts tokens"], more: int):
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        self.model, (texts, self._start) = model, ids.shape
        self._cache = StaticCache(config=model.config.get_text_config(), max_cache_len=self._start + more)
        self._layers = [layer for layer in self._cache.layers if type(layer) is StaticLayer]
        if len(self._layers) < len(self._cache.layers):
            raise EoraLabError("this model does not keep keys and values of all tokens in every layer")
        later = torch.zeros(texts, more, dtype=torch.long, device=ids.device)
        self._mask = torch.cat([mask.long(), later], 1)  # what was not written yet is hidden
        self._written = torch.tensor([self._start], device=ids.device)
        position = (mask.long().cumsum(1) - 1).clamp(0)
        self.logits: Float[Tensor, "texts vocabulary"] = self._call(ids, position)  # of the token after the prompts
        self._token, self._position = ids[:, -1:].clone(), position[:, -1:] + 1
        self._graph: torch.cuda.CUDAGraph | None = None

    def _call(self, ids: Tensor, position: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids, attention_mask=self._mask, position_ids=position, past_key_values=self._cache, use_cache=True
        )
        return output.logits[:, -1]

    def _step(self) -> Tensor:
        self._mask.index_fill_(1, self._written, 1)
        self._written += 1
        logits = self._call(self._token, self._position)
        self._position += 1
        return logits

    def capture(self) -> None:
        """Make the step a CUDA graph. Raises EoraLabError when the model does what no graph can hold."""
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # kernels are compiled and memory is found outside of the graph
                self._step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                after = self._step()
        except RuntimeError as error:
            raise EoraLabError(f"no CUDA graph of this model: {one_line(error)}") from error
        for layer in self._layers:  # the step that came before the graph never was
            layer.cumulative_length.fill_(self._start)
        self._mask[:, self._start :] = 0
        self._written -= 1
        self._position -= 1
        self._graph, self._after = graph, after

    def take(self, token: Int[Tensor, " texts"]) -> None:
        """Go on by one token of each text; `logits` are then those of the next one."""
        self._token.copy_(token[:, None])
        if self._graph is None:
            self.logits = self._step()
        else:
            self._graph.replay()
            self.logits = self._after


def write(
    steps: Steps,
    ends: Sequence[int],
    tokens: int,
    temperature: float = 0.0,
    each: Callable[[Tensor], object] | None = None,
) -> Int[Tensor, "texts written"]:
    """What follows, at most `tokens` tokens a text; of a text that has ended, the first of `ends` to the last column.

    temperature: 0: the likeliest token; else sampled by torch's random numbers. each: is handed every column (texts,).
    """
    columns: list[Tensor] = []
    stop = torch.tensor(list(ends), device=steps.logits.device)
    ended = torch.zeros(len(steps.logits), dtype=torch.bool, device=steps.logits.device)
    while True:
        logits = steps.logits.float()
        chances = (logits / temperature).softmax(-1) if temperature else logits
        token = torch.multinomial(chances, 1)[:, 0] if temperature else chances.argmax(-1)
        if len(stop):
            token = torch.where(ended, stop[0], token)
            ended |= torch.isin(token, stop)
        columns.append(token)
        if each:
            each(token)
        if len(columns) == tokens or bool(ended.all()):
            return torch.stack(columns, 1)
        steps.take(token)
