"""What a model hands its decoder blocks beside the hidden states: masks, positions, inputs of a layer's own.

It is noted for every mini-batch, because it may depend on the tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from eora_lab.errors import EoraLabError


class Call(NamedTuple):
    """What a block is called with beside the hidden states."""

    args: tuple
    kwargs: dict[str, Any]


class _Away(NamedTuple):
    """A tensor that waits on the CPU."""

    tensor: Tensor
    device: torch.device


class _Handed(NamedTuple):
    """A tensor that a block before returned after its hidden states: which block, and which tensor."""

    giver: str
    number: int


PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)  # nothing that a block could change


class _AllBlocksSeen(Exception):
    pass


class BlockCalls:
    """The calls of every block, a set for each mini-batch that entered.

    A tensor that is the same in the mini-batch before is held once; one that depends on the tokens waits on the CPU
    until its block runs. What a block returns after its hidden states, and another one is handed as it is, is what that
    block returned last. What else is handed on, such as a store of keys that blocks share, is the mini-batch's own.

    blocks: name -> block, in the order they run.
    rest:   name -> what a block returns after the hidden states, for models that unpack it.
    alone:  whether blocks hand each other hidden states and nothing else, so far as was seen.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], rest: Mapping[str, tuple | list]):
        self.model, self.blocks = model, dict(blocks)
        # copies, so that one that several blocks return is told apart
        self.rest = {name: _mapped(one, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, {})
                     for name, one in rest.items()}  # fmt: skip
        self._places = {id(t): _Handed(name, i) for name, one in self.rest.items() for i, t in enumerate(_tensors(one))}
        self._handed: list[dict[str, list[Tensor]]] = []  # a mini-batch: giver -> what it returned last
        self._givers: set[str] = set()
        self.alone = True
        self._calls: list[dict[str, Call]] = []
        self._before: list[Tensor] = []  # tensors of the mini-batch before, in the order they were met

    @torch.no_grad()
    def enter(self, tokens: Int[Tensor, "batch seqlen"]) -> Float[Tensor, "... hidden"]:
        """Embed a mini-batch and note its calls. Blocks pass their input on meanwhile."""
        states: list[Tensor] = []
        calls: dict[str, Call] = {}

        def note(name: str) -> Callable:
            def forward(*args, **kwargs):
                hidden, calls[name] = split(name, args, kwargs)
                states.append(hidden)
                if len(calls) == len(self.blocks):
                    raise _AllBlocksSeen
                return self._returned(name, hidden)

            return forward

        with self._instead(note), suppress(_AllBlocksSeen):
            self.model(tokens, use_cache=False)
        self._calls.append(self._kept(calls))
        self._handed.append({})
        return states[0]

    def leave(
        self, tokens: Int[Tensor, "batch seqlen"], hidden: Float[Tensor, "... hidden"]
    ) -> Float[Tensor, "batch seqlen vocabulary"]:
        """The logits that the model makes of what its last block returns. Blocks pass their input on meanwhile.

        What follows the blocks looks at each token by itself in most models: then any part of a sequence will do.
        """
        last = list(self.blocks)[-1]

        def step_over(name: str) -> Callable:
            return lambda *args, **kwargs: self._returned(
                name, hidden if name == last else split(name, args, kwargs)[0]
            )

        with self._instead(step_over):
            return self.model(tokens, use_cache=False).logits

    @contextmanager
    def _instead(self, forward: Callable[[str], Callable]) -> Iterator[None]:
        """Let the blocks do something else: name -> what."""
        for name, block in self.blocks.items():
            block.forward = forward(name)
        try:
            yield
        finally:
            for block in self.blocks.values():
                del block.forward

    def _returned(self, name: str, hidden: Float[Tensor, "... hidden"]) -> Any:
        """Hidden states in the form in which a block returns them."""
        return type(self.rest[name])([hidden, *self.rest[name]]) if name in self.rest else hidden

    def run(self, mini_batch: int, name: str, hidden: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        """Run a block as it is now on hidden states of that mini-batch."""
        handed = self._handed[mini_batch]

        def back(leaf: Any) -> Any:
            if isinstance(leaf, _Handed):
                return handed[leaf.giver][leaf.number]
            return leaf.tensor.to(leaf.device) if isinstance(leaf, _Away) else leaf

        args, kwargs = _mapped(self._calls[mini_batch][name], back, {})
        output = self.blocks[name](hidden, *args, **kwargs)
        if name in self._givers:
            handed[name] = list(_tensors(output[1:]))
        return hidden_states(name, output)

    def _kept(self, calls: dict[str, Call]) -> dict[str, Call]:
        before, met = self._before, list[Tensor]()

        def keep(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                self.alone = self.alone and (leaf is None or isinstance(leaf, PLAIN))
                return leaf
            if place := self._places.get(id(leaf)):
                self._givers.add(place.giver)
                self.alone = False
                return place
            known = before[len(met)] if len(met) < len(before) else None
            if known is not None and same(known, leaf):
                met.append(known)
                return known
            met.append(leaf)
            return leaf if leaf.is_cpu or not before else _Away(leaf.cpu(), leaf.device)

        kept = _mapped(calls, keep, {})
        self._before = met
        return kept


def same(one: Shaped[Tensor, "..."], other: Shaped[Tensor, "..."]) -> bool:
    """Whether two tensors are interchangeable."""
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)


def split(name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[Float[Tensor, "... hidden"], Call]:
    """The hidden states that block `name` is called with, and the rest. Raises EoraLabError when there are none."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise EoraLabError(f"{name} is no decoder block that EoRA Lab can run: it is not handed hidden states first")
    others = {key: value for key, value in kwargs.items() if args or key != "hidden_states"}
    return hidden, Call(args[1:], others)


def hidden_states(name: str, output: Any) -> Float[Tensor, "... hidden"]:
    """The hidden states in what block `name` returns. Raises EoraLabError when they are not what comes first."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise EoraLabError(f"{name} is no decoder block that EoRA Lab can run: it returns no hidden states first")
    return first


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in plain containers, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _mapped(value: Any, change: Callable[[Any], Any], done: dict[int, Any]) -> Any:
    """Plain containers anew, their leaves changed; what is one object in many places stays one."""
    if id(value) not in done:
        new: Any
        if type(value) is dict:
            new = {key: _mapped(one, change, done) for key, one in value.items()}
        elif type(value) is Call:
            new = Call(*(_mapped(one, change, done) for one in value))
        elif type(value) in (tuple, list):
            new = type(value)(_mapped(one, change, done) for one in value)
        else:
            new = change(value)
        done[id(value)] = new
    return done[id(value)]
