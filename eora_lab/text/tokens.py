"""From texts to token batches: what the model sees while its statistics are measured, and what it is evaluated on.

Everything is drawn from one seed. No special tokens are added but one: where the tokenizer itself begins a text with a
BOS token (`start_token`), so does every sequence, and has one token of text fewer. Sources are in
`eora_lab.text.sources`; the packing of each follows the EoRA paper's calibration (arXiv:2410.21271): random windows of
WikiText-2, task examples joined until a sequence is full, random windows of long C4 documents, and half-half mixes of
task and C4.
"""

import operator
import os
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from eora_lab.errors import EoraLabError
from eora_lab.model.limits import check_tokens
from eora_lab.model.start import start_token
from eora_lab.text.read import parts_of, read_source

SELF_BATCH = 8  # sequences sampled from the model at once; bounds the key-value cache

Encode = Callable[[str], Int[Tensor, " tokens"]]


def calibration_batches(
    tokenizer,
    source: str | os.PathLike,
    nsamples: int,
    seqlen: int,
    seed: int = 0,
    share: float = 0.5,
    model: torch.nn.Module | None = None,
) -> Int[Tensor, "nsamples seqlen"]:
    """Token sequences to calibrate on; the same arguments give the same sequences.

    Args:
        tokenizer: a transformers tokenizer.
        source: a name in `SOURCES`, `name:split`, the path of a UTF-8 text file, `file:column` of a JSONL, JSON, CSV
            or Parquet file (texts, or chats for the tokenizer's template), "self" (text sampled from `model`, so that
            no data is needed), or a mix of these such as "arc+c4".
        share: the part of the samples that the first source of a mix gets; the others split the rest evenly.
            Each gets at least one if there are enough.
        model: the uncompressed causal language model, for "self" only.

    Raises:
        EoraLabError: unknown source or split, data not found, too little text, or an argument out of range.
    """
    nsamples, seqlen = _positive("nsamples", nsamples), _positive("seqlen", seqlen)
    if not 0 < share < 1:
        raise EoraLabError(f"share must lie between 0 and 1, not {share}")
    parts = parts_of(source)
    drawn = []
    for part, count in zip(parts, _shares(nsamples, len(parts), share), strict=True):
        if count and part == "self":
            drawn.append(_sample_from_model(model, tokenizer, count, seqlen, seed))
        elif count:
            texts, join, packing = read_source(part, tokenizer)
            pack = {"running": _pack_running, "examples": _pack_examples, "documents": _pack_documents}[packing]
            room, rng = _room(tokenizer, seqlen), random.Random(seed)
            drawn.append(_begun(tokenizer, pack(part, texts, join, _encoder(tokenizer), count, room, rng)))
    batches = torch.cat(drawn)  # (nsamples, seqlen)
    if len(drawn) > 1:
        batches = batches[torch.randperm(nsamples, generator=torch.Generator().manual_seed(seed))]
    return batches


def token_windows(
    tokenizer, source: str | os.PathLike, n: int | None = None, seqlen: int = 512
) -> Int[Tensor, "n seqlen"]:
    """The first n windows of a source's running text (all whole ones for None), in order and without overlap.

    For evaluation: the perplexity of WikiText-2 as usually reported is over `token_windows(tokenizer,
    "wikitext2:test", seqlen=2048)`.

    Raises:
        EoraLabError: unknown source or split, data not found, too little text, or an argument out of range.
    """
    n, seqlen = None if n is None else _positive("n", n), _positive("seqlen", seqlen)
    parts = parts_of(source)
    if len(parts) > 1 or parts == ["self"]:
        raise EoraLabError(f"windows of running text need one source of text, not {source!r}")
    texts, join, _ = read_source(parts[0], tokenizer)
    tokens, room = _encoder(tokenizer)(join.join(texts)), _room(tokenizer, seqlen)
    _check_length(parts[0], tokens, room)
    whole = len(tokens) // room
    if n is not None and n > whole:
        raise EoraLabError(
            f"{parts[0]} has {len(tokens)} tokens, which is {whole} windows of {seqlen}, not {n}: "
            "ask for fewer or shorter ones"
        )
    n = whole if n is None else n
    return _begun(tokenizer, tokens[: n * room].view(n, room))


def _room(tokenizer, seqlen: int) -> int:
    """Tokens of text in a sequence: one fewer where it begins with a BOS token."""
    room = seqlen - (start_token(tokenizer) is not None)
    if not room:
        raise EoraLabError(f"seqlen must be 2 or more, for this tokenizer begins a text with {tokenizer.bos_token}")
    return room


def _begun(tokenizer, tokens: Int[Tensor, "n room"]) -> Int[Tensor, "n seqlen"]:
    """Sequences of text with the BOS token before them, where there is to be one."""
    start = start_token(tokenizer)
    return tokens if start is None else F.pad(tokens, (1, 0), value=start)


def _shares(nsamples: int, parts: int, share: float) -> list[int]:
    """Samples for each part: the first its share, the others equal ones, none empty if there are enough."""
    if parts == 1:
        return [nsamples]
    first = max(1, min(int(nsamples * share + 0.5), nsamples - (parts - 1)))
    even, extra = divmod(nsamples - first, parts - 1)
    return [first] + [even + (i < extra) for i in range(parts - 1)]


# --- packing: (part, texts, join, encode, nsamples, seqlen, rng) -> (nsamples, seqlen) -----------------------------


def _encoder(tokenizer) -> Encode:
    def encode(text: str) -> Int[Tensor, " tokens"]:
        # not verbose: a text longer than the model's context is what we want here
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)

    return encode


def _pack_running(
    part: str, texts: list[str], join: str, encode: Encode, nsamples: int, seqlen: int, rng: random.Random
) -> Int[Tensor, "nsamples seqlen"]:
    """Windows at distinct random places of the joined text."""
    tokens = encode(join.join(texts))
    _check_length(part, tokens, seqlen)
    places = len(tokens) - seqlen + 1
    if places < nsamples:
        raise EoraLabError(
            f"{part} has {len(tokens)} tokens, which is {places} distinct windows of {seqlen}, not {nsamples}: "
            "use more text, fewer samples or a shorter seqlen"
        )
    return torch.stack([tokens[start : start + seqlen] for start in rng.sample(range(places), nsamples)])


def _pack_examples(
    part: str, texts: list[str], join: str, encode: Encode, nsamples: int, seqlen: int, rng: random.Random
) -> Int[Tensor, "nsamples seqlen"]:
    """Shuffled examples, joined until a sequence is full. Each sequence starts with a new one, none is used twice."""
    sequences: list[Tensor] = []
    waiting: list[str] = []
    length = 0
    for text in rng.sample(texts, len(texts)):
        waiting.append(text)
        length += len(encode(text + join))  # a guess: tokens may merge across the joints
        if length >= seqlen and len(tokens := encode(join.join(waiting))) >= seqlen:
            sequences.append(tokens[:seqlen])
            waiting, length = [], 0
            if len(sequences) == nsamples:
                return torch.stack(sequences)
    _check_length(part, encode(join.join(texts)), seqlen)
    raise EoraLabError(
        f"the {len(texts)} examples of {part} fill {len(sequences)} sequences of {seqlen} tokens, not {nsamples}: "
        "use fewer samples, a shorter seqlen or a mix"
    )


def _pack_documents(
    part: str, texts: list[str], _join: str, encode: Encode, nsamples: int, seqlen: int, rng: random.Random
) -> Int[Tensor, "nsamples seqlen"]:
    """One random window from each of nsamples documents that are longer than a sequence."""
    windows: list[Tensor] = []
    for text in rng.sample(texts, len(texts)):
        if len(tokens := encode(text)) > seqlen:
            start = rng.randrange(len(tokens) - seqlen + 1)
            windows.append(tokens[start : start + seqlen])
            if len(windows) == nsamples:
                return torch.stack(windows)
    raise EoraLabError(
        f"{part} has {len(windows)} documents longer than {seqlen} tokens, not {nsamples}: "
        "use fewer samples or a shorter seqlen"
    )


@torch.no_grad()
def _sample_from_model(
    model: torch.nn.Module | None, tokenizer, nsamples: int, seqlen: int, seed: int
) -> Int[Tensor, "nsamples seqlen"]:
    """Ancestral samples at temperature 1, from the start token (a random one if the tokenizer has none).

    Text that the model writes itself follows its own training distribution (LLM-QAT, Liu et al. 2023).
    """
    if model is None:
        raise EoraLabError('the source "self" samples from the model: pass model=, the uncompressed one')
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
    if limit is not None and seqlen > limit:
        raise EoraLabError(f"the model takes at most {limit} tokens, seqlen is {seqlen}: use a shorter seqlen")
    from eora_lab.progress import tqdm

    generator = torch.Generator().manual_seed(seed)  # our own: the global state stays as it is
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    start = torch.randint(min(vocabulary, len(tokenizer)), (nsamples, 1), generator=generator)
    if tokenizer.bos_token_id is not None:
        start.fill_(tokenizer.bos_token_id)
    check_tokens(model, start)
    was_training = model.training
    model.eval()
    sampled = []
    try:
        with tqdm(total=nsamples * seqlen, desc="sampling text", unit="token") as bar:
            for first in start.split(SELF_BATCH):
                tokens, cache = [first], None
                bar.update(len(first))
                while len(tokens) < seqlen:
                    output = model(input_ids=tokens[-1].to(model.device), past_key_values=cache, use_cache=True)
                    cache = output.past_key_values
                    probabilities = output.logits[:, -1].float().softmax(-1).cpu()  # (batch, vocabulary)
                    if not probabilities.isfinite().all():
                        raise EoraLabError("the model's logits are not finite: load it in float32 or bfloat16")
                    tokens.append(torch.multinomial(probabilities, 1, generator=generator))
                    bar.update(len(first))
                sampled.append(torch.cat(tokens, dim=1))
    finally:
        model.train(was_training)
    return torch.cat(sampled)


# --- arguments -----------------------------------------------------------------------------------------------------


def _positive(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise EoraLabError(f"{name} must be a whole number of at least 1, not {value!r}")
    return number


def _check_length(part: str, tokens: Tensor, seqlen: int) -> None:
    if len(tokens) < seqlen:
        raise EoraLabError(
            f"{part} has {len(tokens)} tokens, one window needs {seqlen}: use more text or a shorter seqlen"
        )
