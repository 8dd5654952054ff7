"""The other side of a linear: the gradients at its output, by one backward pass with frozen weights."""

import re
from collections.abc import Callable, Container, Mapping
from typing import Literal, get_args

import torch
from torch import nn

from eora_lab.calibrate.backward import BackwardPass, frozen, towards
from eora_lab.calibrate.contract import Contract, check_blocks
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
from eora_lab.progress import each
from eora_lab.text.batches import Batches, as_tokens

Labels = Literal["model", "text"]


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
    statistics of all layers, and what `BackwardPass` keeps. The model is as before afterwards.
    Raises EoraLabError when no layer matches, when these are no token ids of the model, with the name of a block whose
    gradients cannot be had from that block alone, and on NaN or Inf in a gradient, with the layer's name.
    """
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
            for _, ((part, held), (drawn, _)) in each(parts, "gradients", "batch", progress):
                outputs.held_out = held
                for few, own in zip(part.split(backward.sequences), drawn.split(backward.sequences), strict=True):
                    for block, _ in backward.gradients(few, towards(few, own if labels == "model" else None)):
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


def mixtures_of(model: nn.Module) -> list[list[str]]:
    """Full names of linears that the experts of one mixture have in common, of all blocks."""
    return [
        [f"{prefix}.{name}" for name in names]
        for prefix, block in decoder_blocks(model).items()
        for names in experts_of(block)
    ]
