"""Before a pass: do the blocks, run one by one, what they do within the model?

A pass hands hidden states from block to block by itself and puts other modules in the place of linears. Both are tried
on a few tokens with the unchanged blocks and held against a plain pass of the model. It needs two short sequences, and
so next to no time.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eora_lab.calibrate.calls import BlockCalls, hidden_states
from eora_lab.environment import step
from eora_lab.errors import EoraLabError, one_line
from eora_lab.model.structure import block_linears, decoder_blocks, linears

SEQUENCES, TOKENS = 2, 32  # two mini-batches show what one leaves behind for the other
RUNS = 2  # a block runs more than once in a pass: to measure, and to move on
OFFERED = ("in_features", "out_features", "bias")  # what a compressed layer has of a linear, beside the product


@dataclass(frozen=True)
class Contract:
    """What was found out about the blocks of a model.

    rest: name of a block -> what it returns after the hidden states, as the model unpacks it.
    left: full names of linears that are no plain product to the model (it reads the weight itself, or the class
          multiplies in a way of its own), and those of `lent`: they have to stay as they are.
    lent: linears that do not run, and share their weight with one that does, as in blocks that share a transformer.
    idle: modules outside the blocks of which nothing ran on text, such as a tower for pictures.
    apart: linears that share some of their inputs with another one, but not all: each is measured by itself.
    shared: linear -> the first that is handed the same tensors, of those that run.
    """

    rest: dict[str, tuple | list]
    left: frozenset[str]
    lent: frozenset[str]
    idle: frozenset[str]
    apart: frozenset[str]
    shared: dict[str, str] = field(default_factory=dict)


_NONE = frozenset[str]()
UNTRIED = Contract({}, _NONE, _NONE, _NONE, _NONE)  # of a model that nothing runs through


@step("checks")
@torch.no_grad()
def check_blocks(model: nn.Module, tokens: Int[Tensor, "nsamples seqlen"]) -> Contract:
    """Try the blocks on the first tokens. The model is not changed.

    Raises EoraLabError with the name of a block that cannot be streamed exactly: one that does not run once a pass, in
    order; one that by itself gives other hidden states than within the model.
    """
    blocks = decoder_blocks(model)
    _check_modules(model, blocks)
    probes = tokens[:SEQUENCES, :TOKENS].to(next(model.parameters()).device).split(1)
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    called = set[nn.Module]()
    plain = [plain_pass(model, blocks, probe, called) for probe in probes]
    if changed := [name for name, parameter in model.named_parameters() if parameter._version != versions[name]]:
        raise EoraLabError(f"{changed[0]} is changed by the model itself as it runs: what it was cannot be compressed")
    rest = _rest(plain[0])
    calls = BlockCalls(model, blocks, rest)
    ran, apart, shared = set[str](), set[str](), dict[str, str]()
    with _stand_ins(model) as (left, inputs):
        with in_one_line(f"{type(model).__name__} cannot be run block by block"):
            hidden = [calls.enter(probe) for probe in probes]
        for name in blocks:
            within = [hidden_states(name, outputs[name]) for outputs in plain]
            for _ in range(RUNS):
                for i, wanted in enumerate(within):
                    inputs.clear()
                    with in_one_line(f"{name} cannot be run by itself"):
                        found = calls.run(i, name, hidden[i])
                    _compare(name, found, wanted)
                    ran |= inputs.keys()
            apart |= share_some(inputs)
            first: dict[int, str] = {}
            shared |= {one: first.setdefault(id(own[0]), one) for one, own in inputs.items()}
            hidden = within
    every = block_linears(model)
    used = {id(linear.weight) for name, linear in every.items() if name in ran}
    lent = frozenset(name for name, linear in every.items() if name not in ran and id(linear.weight) in used)
    return Contract(rest, lent | left, lent, frozenset(_idle(model, blocks, called)), frozenset(apart), shared)


@torch.no_grad()
def returned(model: nn.Module, tokens: Int[Tensor, "nsamples seqlen"]) -> dict[str, tuple | list]:
    """`Contract.rest` alone, for a model whose blocks were tried before it was compressed.

    Raises EoraLabError when a block does not run once, in order.
    """
    probe = tokens[:1, :TOKENS].to(next(model.parameters()).device)
    return _rest(plain_pass(model, decoder_blocks(model), probe, set()))


def _rest(outputs: dict[str, Any]) -> dict[str, tuple | list]:
    return {name: output[1:] for name, output in outputs.items() if isinstance(output, tuple | list)}


def _check_modules(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    """Raise EoraLabError where a linear is not the block's own, or is wrapped."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise EoraLabError(
                f"{name} is wrapped by peft: merge the adapter first (model = model.merge_and_unload()), or load the "
                "model without it"
            )
    owners: dict[int, str] = {}
    for prefix, block in blocks.items():
        for local, linear in linears(block).items():
            if (owner := owners.setdefault(id(linear), prefix)) != prefix:
                raise EoraLabError(
                    f"{prefix}.{local} is a module of {owner} as well: only blocks with linears of their own can be "
                    "compressed"
                )


def plain_pass(
    model: nn.Module, blocks: dict[str, nn.Module], tokens: Int[Tensor, "1 seqlen"], called: set[nn.Module]
) -> dict[str, Any]:
    """What every block returns within the model, for one sequence. Adds all modules that run to `called`.

    Raises EoraLabError when the model does not run, or a block does not run once, in order.
    """
    ran: list[str] = []
    outputs: dict[str, Any] = {}

    def after(name: str):
        def hook(_module, _args, output):
            ran.append(name)
            others = output[1:] if isinstance(output, tuple | list) else None
            # a copy, for a model may go on to change its hidden states in place
            first = hidden_states(name, output).clone()
            outputs[name] = first if others is None else type(others)([first, *others])

        return hook

    handles = [block.register_forward_hook(after(name)) for name, block in blocks.items()]
    handles += [module.register_forward_pre_hook(lambda one, _args: called.add(one)) for module in model.modules()]
    try:
        with in_one_line(f"{type(model).__name__} does not run on these tokens alone"):
            model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    _check_order(ran, blocks)
    return outputs


def _idle(model: nn.Module, blocks: dict[str, nn.Module], called: set[nn.Module]) -> Iterator[str]:
    """Names of modules with parts, no block within them or around them, of which nothing ran; the outermost."""
    found: list[str] = []
    for name, module in model.named_modules():
        near = any(f"{name}.".startswith(f"{one}.") or f"{one}.".startswith(f"{name}.") for one in blocks)
        within = any(name.startswith(f"{one}.") for one in found)
        if name and not near and not within and any(module.children()) and not called & set(module.modules()):
            found.append(name)
            yield name


def _check_order(ran: list[str], blocks: dict[str, nn.Module]) -> None:
    times = Counter(ran)
    for name in blocks:
        if times[name] != 1:
            how = f"runs {times[name]} times in a pass" if times[name] else "does not run on text alone"
            raise EoraLabError(
                f"{name} {how}: only models whose decoder blocks each run once, one after the other, can be compressed"
            )
    if ran != list(blocks):
        raise EoraLabError(f"{ran[0]} runs before {next(iter(blocks))}: the decoder blocks do not run in their order")


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Say in one line what fails where the code of a model raises any error."""
    try:
        yield
    except EoraLabError:
        raise
    except Exception as error:
        raise EoraLabError(f"{what}: {one_line(error)}") from error


def _compare(name: str, found: Tensor, wanted: Tensor) -> None:
    """Raise EoraLabError unless both are the same, up to the roundings of sums in another order."""
    error = relative_error(found, wanted)
    if not error <= tolerance(wanted.dtype):
        raise EoraLabError(
            f"{name} gives other hidden states by itself than within the model (relative error {error:.1e}): "
            "it depends on more than it is handed, and cannot be compressed exactly"
        )


def share_some(inputs: dict[str, list[Tensor]]) -> set[str]:
    """Names of linears that share one input, but not every one. inputs: name -> the tensors that it was handed."""
    first: dict[int, str] = {}
    apart = set()
    for name, own in inputs.items():
        for x in own:
            other = first.setdefault(id(x), name)
            if [id(x) for x in inputs[other]] != [id(x) for x in own]:
                apart |= {name, other}
    return apart


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that is left to rounding. Kernels, shapes and values are the same, so it is mostly 0."""
    return max(1e-5, 2 * torch.finfo(dtype).eps)


def relative_error(found: Float[Tensor, "*shape"], wanted: Float[Tensor, "*other"]) -> float:
    """|found - wanted| / |wanted|; what is not finite in both alike does not count."""
    if found.shape != wanted.shape:
        return float("inf")
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    if same.all():
        return 0.0
    difference = torch.where(same, torch.zeros_like(wanted), found - wanted).float().norm()
    norm = wanted.float().nan_to_num(0, 0, 0).norm()
    return float(difference / norm) if norm else float("inf")


class _StandIn(nn.Module):
    """In the place of a linear, as a compressed layer will be: it multiplies. Notes when more is wanted of it."""

    def __init__(self, name: str, linear: nn.Linear, left: set[str], inputs: dict[str, list[Tensor]]):
        super().__init__()
        self.name, self.linear, self.left, self.inputs = name, linear, left, inputs

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.linear, name)
        if name not in OFFERED:
            self.left.add(self.name)
        return value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.linear(*args, **kwargs)
        if len(args) != 1 or kwargs:
            raise EoraLabError(f"{self.name} is called with more than its input, which no compressed layer takes")
        self.inputs.setdefault(self.name, []).append(args[0])
        if type(self.linear).forward is not nn.Linear.forward:
            plain = nn.functional.linear(args[0].to(self.linear.weight.dtype), self.linear.weight, self.linear.bias)
            alike = isinstance(output, Tensor) and output.dtype == args[0].dtype
            if not alike or not relative_error(output, plain) <= tolerance(plain.dtype):
                self.left.add(self.name)
        return output


@contextmanager
def _stand_ins(model: nn.Module) -> Iterator[tuple[set[str], dict[str, list[Tensor]]]]:
    """Stand-ins for all linears of the blocks. Yields the names of those that more is wanted of, and name -> inputs."""
    originals, left, inputs = block_linears(model), set[str](), dict[str, list[Tensor]]()
    try:
        for name, linear in originals.items():
            model.set_submodule(name, _StandIn(name, linear, left, inputs))
        yield left, inputs
    finally:
        for name, linear in originals.items():
            model.set_submodule(name, linear)
