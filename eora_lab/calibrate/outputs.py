"""The other side of a linear: the gradients at its output, by one backward pass with frozen weights.

A mini-batch goes forward block by block, and only what enters each block is kept. Logits, loss and the gradient at the
last block's output are made of some tokens at a time, by the model's own head. Then the way back, block by block: each
runs once more, with gradients for its input alone. Whether that gives the gradients of the whole model is tried first.
"""

import re
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eora_lab.calibrate.calls import BlockCalls, split
from eora_lab.calibrate.contract import TOKENS, Contract, check_blocks, in_one_line, relative_error
from eora_lab.calibrate.experts import draw_together, experts_of, too_large
from eora_lab.calibrate.output_statistics import OutputStatistics
from eora_lab.calibrate.processes import ALONE, Processes
from eora_lab.calibrate.shares import add_up, hand_out
from eora_lab.calibrate.stream import in_mini_batches
from eora_lab.environment import step
from eora_lab.errors import EoraLabError, unknown
from eora_lab.model.structure import block_linears, decoder_blocks
from eora_lab.model.unfold import unfold
from eora_lab.products import fast_products
from eora_lab.text.batches import Batches, as_tokens

Labels = Literal["model", "text"]
LOGITS = 2**24  # that are held at once
ROUNDING = 8  # times the precision of the hidden states, or 1e-4, that gradients by block and of the model may differ


@step("gradients")
@fast_products()
def collect_output_statistics(
    model: nn.Module,
    batches: Batches,
    held_out: float = 0.0,
    labels: str = "model",
    seed: int = 0,
    progress: bool = True,
    only: str = "",
    contract: Contract | None = None,
    left: Container[str] = (),
    processes: Processes = ALONE,
    owners: Mapping[str, int] | None = None,
) -> dict[str, OutputStatistics]:
    """Statistics of the gradients at the output of every block linear; module name -> OutputStatistics.

    The loss is the cross-entropy of all predicted tokens of a sequence, in nats, summed.

    batches:  token ids (nsamples, seqlen): a tensor, an array, or a list of sequences.
    held_out: share of the samples, the last ones, that is measured apart (`.held_out`).
    labels:   "model": one drawn from the model's own prediction at every token, so that F is the Fisher information;
              "text": the next token, which gives the empirical one.
    seed:     of what is drawn. It does not depend on how tokens are batched.
    only:     regular expression; layers whose name it does not match are not measured.
    contract: from `check_blocks`, where the blocks were tried before; else they are now.
    left:     names of layers that are not measured either.
    processes, owners: see `collect_statistics`.
    Experts are drawn towards all of their mixture, as their inputs are (`eora_lab.calibrate.experts`). Holds the
    statistics of all layers, and what enters the blocks for one mini-batch. The model is as before afterwards.
    Raises EoraLabError when no layer matches, when these are no token ids of the model, with the name of a block whose
    gradients cannot be had from that block alone, and on NaN or Inf in a gradient, with the layer's name.
    """
    from tqdm.auto import tqdm

    if labels not in get_args(Labels):
        raise unknown("labels", labels, get_args(Labels))
    unfold(model)
    tokens = as_tokens(model, batches)
    if tokens.shape[1] < 2:
        raise EoraLabError(f"a loss needs sequences of two tokens or more, not {tokens.shape[1]}")
    contract = contract or check_blocks(model, tokens)
    linears = {
        name: linear
        for name, linear in block_linears(model).items()
        if re.search(only, name) and name not in contract.left and name not in left
    }
    if not linears:
        raise EoraLabError(f"no layer matches {only!r}; names are like {next(iter(block_linears(model)))}")
    outputs = Outputs(linears, mixtures_of(model))
    tokens = tokens.to(next(model.parameters()).device)
    draws = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)).to(tokens.device)
    parts = processes.share(list(zip(in_mini_batches(tokens, held_out), in_mini_batches(draws, held_out), strict=True)))
    first = next(prefix for prefix in decoder_blocks(model) if any(name.startswith(f"{prefix}.") for name in linears))
    with processes.agree(), frozen(model):
        backward = BackwardPass(model, contract, tokens)
        handles = [linear.register_forward_hook(outputs.hook(name)) for name, linear in linears.items()]
        try:
            for _, ((part, held), (drawn, _)) in tqdm(
                parts, desc="gradients", unit="batch", disable=not progress, leave=False
            ):
                outputs.held_out = held
                for block, _ in backward.gradients(part, drawn if labels == "model" else None):
                    if block == first:
                        break
        finally:
            for handle in handles:
                handle.remove()
    return outputs.found(processes, owners)


class Outputs:
    """Statistics of linears, while gradients come by. Experts share one where theirs would take too much memory.

    linears:  full module name -> linear. mixtures: names of those that the experts of a mixture have in common.
    held_out: whether what comes now is measured apart.
    """

    def __init__(self, linears: dict[str, nn.Linear], mixtures: list[list[str]]):
        self._mixtures = [[name for name in names if name in linears] for names in mixtures]
        self._mixtures = [names for names in self._mixtures if names]
        experts = sum(map(len, self._mixtures))  # of all blocks, for theirs are held together
        one = {
            n: names[0] for names in self._mixtures if too_large(experts, linears[names[0]].out_features) for n in names
        }
        made: dict[str, OutputStatistics] = {}
        self._found: dict[str, OutputStatistics] = {}
        for name, linear in linears.items():
            first = one.get(name, name)
            if first not in made:
                made[first] = OutputStatistics(linear.out_features, linear.weight.device, first)
            self._found[name] = made[first]
        self.held_out = False

    def hook(self, name: str) -> Callable:
        """A forward hook for the linear of that name. It does nothing where gradients are not asked for."""

        def watch(_module, _args, output):
            if torch.is_grad_enabled():
                if not output.requires_grad:  # it does not depend on the hidden states
                    output.requires_grad_()
                output.register_hook(lambda g: self._part(name).update(g))

        return watch

    def _part(self, name: str) -> OutputStatistics:
        one = self._found[name]
        if not self.held_out:
            return one
        if one.held_out is None:
            one.held_out = OutputStatistics(one.out_features, one.device, one.name)
        return one.held_out

    def found(
        self, processes: Processes = ALONE, owners: Mapping[str, int] | None = None
    ) -> dict[str, OutputStatistics]:
        """Module name -> statistics, in the end; of 0 tokens where no gradient came. The rest as of `Inputs`."""
        found, homes = self._found, dict[str, int]()
        if processes.count > 1:
            homes = add_up(found, {}, self._mixtures, owners or {}, processes)
        for names in self._mixtures:
            members = {id(found[name]): found[name] for name in names}
            if homes.get(names[0], processes.rank) == processes.rank and len(members) > 1:
                draw_together(members.values(), [])
        return hand_out(found, homes, owners or {}, processes) if homes else found


class BackwardPass:
    """The way of a mini-batch through the decoder and back, with frozen weights (`frozen`).

    tokens: (nsamples, seqlen), on the first of which it is tried.
    Raises EoraLabError with the name of a block whose gradients cannot be had from that block alone, such as one that
    hands on keys and values, and where the model's head cannot be run on hidden states alone.
    """

    def __init__(self, model: nn.Module, contract: Contract, tokens: Int[Tensor, "nsamples seqlen"]):
        self.model, self.blocks, self._contract = model, decoder_blocks(model), contract
        self._vocabulary = 0
        self._check(tokens[:1, :TOKENS])

    def gradients(
        self, tokens: Int[Tensor, "batch seqlen"], draws: Float[Tensor, "batch seqlen"] | None, places: int = 0
    ) -> Iterator[tuple[str, Float[Tensor, "... hidden"]]]:
        """Name of a block and d loss / d its input, (..., batch, seqlen, hidden), the last block first.

        draws:  in [0, 1), what labels are drawn from the predictions by; None: the labels are the next tokens.
        places: of a sequence, that logits are held for at once; 0: what memory allows.
        """
        calls = BlockCalls(self.model, self.blocks, self._contract.rest)
        inputs = []
        with torch.no_grad():
            hidden = calls.enter(tokens)
            for name in self.blocks:
                inputs.append(hidden)
                hidden = calls.run(0, name, hidden)
        gradient = self._at_the_end(calls, hidden, tokens, draws, places)
        for name in reversed(self.blocks):
            x = inputs.pop().detach().requires_grad_()
            with torch.enable_grad():
                output = calls.run(0, name, x)
            torch.autograd.backward(output, gradient)
            del output
            assert x.grad is not None
            gradient = x.grad
            yield name, gradient

    def _at_the_end(
        self, calls: BlockCalls, hidden: Tensor, tokens: Tensor, draws: Tensor | None, places: int
    ) -> Tensor:
        """d loss / d hidden states that leave the last block, of the same shape."""
        places = places or max(LOGITS // (len(tokens) * self._vocabulary), 1)
        targets, gradient = next_tokens(tokens), torch.empty_like(hidden)
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
            slope = loss_slope(logits.detach(), targets[:, here] if draws is None else draws[:, here])
            (gradient[..., here, :],) = torch.autograd.grad(logits, x, slope)
        return gradient

    def _check(self, tokens: Int[Tensor, "1 seqlen"]) -> None:
        """Hold gradients block by block against those of the whole model, on the next tokens of one short sequence."""
        whole = self._of_the_whole(tokens)
        with in_one_line(f"{type(self.model).__name__} makes no logits of hidden states by themselves"):
            ours = dict(self.gradients(tokens, None, places=tokens.shape[1] // 2 + 1))
        for name, found in ours.items():
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
                slope = loss_slope(logits.detach(), next_tokens(tokens))
                found = torch.autograd.grad(logits, list(inputs.values()), slope)
        finally:
            for handle in handles:
                handle.remove()
        self._vocabulary = logits.shape[-1]
        return dict(zip(inputs, found, strict=True))


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


def mixtures_of(model: nn.Module) -> list[list[str]]:
    """Full names of linears that the experts of one mixture have in common, of all blocks."""
    return [
        [f"{prefix}.{name}" for name in names]
        for prefix, block in decoder_blocks(model).items()
        for names in experts_of(block)
    ]


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
