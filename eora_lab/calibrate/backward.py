"""Gradients back through the decoder, block by block, with frozen weights.

A mini-batch goes forward block by block. Logits, and the gradient of a loss at the last block's output, are made of
some tokens at a time, by the model's own head. Then the way back, block by block: what a block's gradients need was
kept on the way forward where memory allows, else the block runs once more. Whether that gives the gradients of the
whole model is tried first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eora_lab.calibrate.calls import BlockCalls, split
from eora_lab.calibrate.contract import TOKENS, Contract, in_one_line, relative_error
from eora_lab.calibrate.stream import BATCH
from eora_lab.errors import EoraLabError
from eora_lab.model.structure import decoder_blocks

LOGITS = 2**24  # that are held at once
GRAPHS = 2**30  # bytes of what gradients need of blocks, that is kept at the most
ROUNDING = 8  # times the precision of the hidden states, or 1e-4, that gradients by block and of the model may differ

# logits (batch, places, vocabulary) of some places of every sequence -> d loss / d logits, of one loss or of several
Slopes = Callable[[Float[Tensor, "batch places vocabulary"], slice], list[Tensor]]


class BackwardPass:
    """The way of a mini-batch through the decoder and back, with frozen weights (`frozen`).

    tokens:    (nsamples, seqlen), on the first of which it is tried.
    sequences: how many had best go together: so many that all blocks' graphs are kept, if there are any.
    turn:      which of several losses the gradients are of that come by now.
    Raises EoraLabError with the name of a block whose gradients cannot be had from that block alone, such as one that
    hands on keys and values, and where the model's head cannot be run on hidden states alone.
    """

    def __init__(self, model: nn.Module, contract: Contract, tokens: Int[Tensor, "nsamples seqlen"]):
        self.model, self.blocks, self._contract = model, decoder_blocks(model), contract
        self.turn, self._vocabulary = 0, 0
        self._graphs: dict[str, float] = {}  # name of a block -> bytes a token of what its gradients need
        self._check(tokens[:1, :TOKENS])
        fit = int(GRAPHS // max(sum(self._graphs.values()) * tokens.shape[1], 1))
        self.sequences = min(fit, BATCH) or BATCH

    def gradients(
        self, tokens: Int[Tensor, "batch seqlen"], slopes: Slopes, places: int = 0
    ) -> Iterator[tuple[str, list[Float[Tensor, "... hidden"]]]]:
        """Name of a block and d loss / d its input, (..., batch, seqlen, hidden), of every loss; the last block first.

        slopes: of the losses.
        places: of a sequence, that logits are held for at once; 0: what memory allows.
        """
        calls = BlockCalls(self.model, self.blocks, self._contract.rest)
        ways: list[tuple[Tensor, Tensor | None]] = []  # of a block: its input, its output if its graph is kept
        hidden, room = calls.enter(tokens), float(GRAPHS)
        for name in self.blocks:
            x = hidden.detach().requires_grad_()
            size = self._graphs.get(name, GRAPHS + 1) * tokens.numel()
            if keep := size <= room:
                hidden, room = self._with_graph(calls, name, x), room - size
            else:
                with torch.no_grad():
                    hidden = calls.run(0, name, x)
            ways.append((x, hidden if keep else None))
        gradients = self._at_the_end(calls, hidden, tokens, slopes, places)
        for name in reversed(self.blocks):
            x, output = ways.pop()
            if output is None:
                output = self._with_graph(calls, name, x)
            gradients = self._back(x, output, gradients)
            del output
            yield name, gradients

    def _with_graph(self, calls: BlockCalls, name: str, x: Tensor) -> Float[Tensor, "... hidden"]:
        """Run a block for gradients, and note the bytes that these need beside its weights."""
        block, found = self.blocks[name], dict[int, int]()
        weights = {one.untyped_storage().data_ptr() for one in (*block.parameters(), *block.buffers())}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = calls.run(0, name, x)
        self._graphs[name] = sum(found.values()) / (x.numel() / x.shape[-1])
        return output

    def _back(self, x: Tensor, output: Tensor, gradients: list[Tensor]) -> list[Tensor]:
        """d loss / d x of every loss, from those at the output."""
        found = []
        for turn, gradient in enumerate(gradients):
            self.turn = turn
            torch.autograd.backward(output, gradient, retain_graph=turn + 1 < len(gradients))
            assert x.grad is not None
            found.append(x.grad)
            x.grad = None
        return found

    def _at_the_end(
        self, calls: BlockCalls, hidden: Tensor, tokens: Tensor, slopes: Slopes, places: int
    ) -> list[Tensor]:
        """d loss / d hidden states that leave the last block, of the same shape, of every loss."""
        places = places or max(LOGITS // (len(tokens) * self._vocabulary), 1)
        gradients: list[Tensor] = []
        for start in range(0, tokens.shape[1], places):
            here = slice(start, start + places)
            x = hidden[..., here, :].detach().requires_grad_()
            with torch.enable_grad():
                logits = calls.leave(tokens[:, here], x)
            if logits.shape[:2] != tokens[:, here].shape:
                raise EoraLabError(
                    f"{type(self.model).__name__} makes no logits of hidden states by themselves: take a method "
                    "without gradients, such as eora"
                )
            with torch.no_grad():
                found = slopes(logits.detach(), here)
            gradients = gradients or [torch.empty_like(hidden, requires_grad=False) for _ in found]
            for gradient, part in zip(gradients, self._back(x, logits, found), strict=True):
                gradient[..., here, :] = part
        return gradients

    def _check(self, tokens: Int[Tensor, "1 seqlen"]) -> None:
        """Hold gradients block by block against those of the whole model, on the next tokens of one short sequence."""
        whole = self._of_the_whole(tokens)
        with in_one_line(f"{type(self.model).__name__} makes no logits of hidden states by themselves"):
            ours = dict(self.gradients(tokens, towards(tokens), places=tokens.shape[1] // 2 + 1))
        for name, (found,) in ours.items():
            allowed = max(1e-4, ROUNDING * torch.finfo(found.dtype).eps)
            if not (error := relative_error(found, whole[name])) <= allowed:
                raise EoraLabError(
                    f"{name}: gradients by this block alone are not those of the model (relative error {error:.1e}): "
                    "it hands on more than hidden states, so take a method without them, such as eora"
                )

    def _of_the_whole(self, tokens: Tensor) -> dict[str, Tensor]:
        """Name of a block -> d loss / d its input, by the model as it is. Notes the size of the vocabulary."""
        inputs: dict[str, Tensor] = {}

        def note(name: str) -> Callable:
            def hook(_module, args, kwargs):
                hidden, call = split(name, args, kwargs)
                if not inputs:  # what comes before the blocks is left out
                    hidden = hidden.detach().requires_grad_()
                inputs[name] = hidden
                return (hidden, *call.args), call.kwargs

            return hook

        handles = [block.register_forward_pre_hook(note(name), with_kwargs=True) for name, block in self.blocks.items()]
        try:
            with torch.enable_grad(), in_one_line(f"{type(self.model).__name__} gives no gradients"):
                logits = self.model(tokens, use_cache=False).logits
                slopes = towards(tokens)(logits.detach(), slice(None))
                found = torch.autograd.grad(logits, list(inputs.values()), slopes)
        finally:
            for handle in handles:
                handle.remove()
        self._vocabulary = logits.shape[-1]
        return dict(zip(inputs, found, strict=True))


def towards(tokens: Int[Tensor, "batch seqlen"], draws: Float[Tensor, "batch seqlen"] | None = None) -> Slopes:
    """Of the cross-entropy with labels.

    draws: in [0, 1), what labels are drawn from the predictions by; None: the labels are the next tokens.
    """
    targets = next_tokens(tokens) if draws is None else draws
    return lambda logits, here: [loss_slope(logits, targets[:, here])]


def next_tokens(tokens: Int[Tensor, "batch seqlen"]) -> Int[Tensor, "batch seqlen"]:
    """The label of every token; -1 for the last one, which has none."""
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = -1
    return labels


def loss_slope(
    logits: Float[Tensor, "batch seqlen vocabulary"],
    labels: Int[Tensor, "batch seqlen"] | Float[Tensor, "batch seqlen"],
) -> Float[Tensor, "batch seqlen vocabulary"]:
    """d cross-entropy / d logits: the prediction, less one at the label.

    labels: token ids, -1 where there is none; or numbers u in [0, 1), which draw the first token up to which the
            prediction adds up to more than u.
    """
    slope = logits.float().softmax(-1)
    if labels.is_floating_point():
        sums = slope.cumsum(-1)
        labels = torch.searchsorted(sums, labels[..., None] * sums[..., -1:], right=True).squeeze(-1)
        labels = labels.clamp_max(logits.shape[-1] - 1)
    slope.scatter_add_(-1, labels.clamp_min(0)[..., None], slope.new_full((*labels.shape, 1), -1.0))
    slope[labels < 0] = 0
    return slope.to(logits.dtype)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the weights: only what was computed needs them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
