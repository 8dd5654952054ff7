"""Calibration: which tokens come out of a text, a mix or a model, and what a user reads when they cannot."""

import json
import logging
import string
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eora_lab import generate, perplexity
from eora_lab.cli import main
from eora_lab.errors import EoraLabError
from eora_lab.text.tokens import calibration_batches, token_windows
from tests.tiny import begins_texts, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LETTERS = string.ascii_letters + string.digits + " "


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(LETTERS[i * i % len(LETTERS)] for i in range(3000)), encoding="utf-8")
    return path


# --- windows of running text ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(LETTERS, min_size=40, max_size=200).filter(str.strip),
    nsamples=st.integers(1, 12),
    seqlen=st.integers(1, 28),
    seed=st.integers(0, 2**32),
)
def test_random_windows_are_distinct_slices_of_the_text(text, nsamples, seqlen, seed):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_text(text, encoding="utf-8")
        batches = calibration_batches(TOKENIZER, path, nsamples, seqlen, seed)
        again = calibration_batches(TOKENIZER, str(path), nsamples, seqlen, seed)
    assert batches.shape == (nsamples, seqlen) and batches.dtype == torch.long
    assert torch.equal(batches, again)
    windows = torch.tensor(encode(text)).unfold(0, seqlen, 1)  # (places, seqlen)
    for value in batches.unique(dim=0):
        drawn, there = ((rows == value).all(dim=1).sum() for rows in (batches, windows))
        assert drawn <= there  # no place is drawn twice


@settings(max_examples=40, deadline=None)
@given(text=st.text(LETTERS, min_size=20, max_size=200).filter(str.strip), seqlen=st.integers(1, 20))
def test_token_windows_are_the_text_in_order(text, seqlen):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_text(text, encoding="utf-8")
        every = token_windows(TOKENIZER, path, seqlen=seqlen)
        first = token_windows(TOKENIZER, path, n=1, seqlen=seqlen)
    assert every.shape == (len(text) // seqlen, seqlen)
    assert every.flatten().tolist() == encode(text)[: every.numel()]
    assert torch.equal(first, every[:1])


def test_all_places_can_be_drawn(text_file):
    text_file.write_text("abcdefghij", encoding="utf-8")
    batches = calibration_batches(TOKENIZER, text_file, nsamples=7, seqlen=4)
    assert sorted(TOKENIZER.batch_decode(batches)) == ["abcd", "bcde", "cdef", "defg", "efgh", "fghi", "ghij"]


def test_seeds_differ(text_file):
    drawn = [calibration_batches(TOKENIZER, text_file, 8, 64, seed=seed) for seed in (0, 1)]
    assert not torch.equal(*drawn)


def test_byte_order_mark_is_not_text(text_file):
    text_file.write_bytes(b"\xef\xbb\xbfabcd")
    assert TOKENIZER.decode(token_windows(TOKENIZER, text_file, seqlen=4)[0]) == "abcd"


def test_a_long_text_gives_no_warning(text_file):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        calibration_batches(tokenizer, text_file, 2, 32)
        token_windows(tokenizer, text_file, 2, 32)
    finally:
        logger.removeHandler(handler)
    assert not records


# --- mixes ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(nsamples=st.integers(1, 20), parts=st.integers(2, 4), share=st.floats(0.01, 0.99))
def test_a_mix_keeps_its_share_and_leaves_none_out(nsamples, parts, share):
    with tempfile.TemporaryDirectory() as folder:
        for letter in "abcd"[:parts]:
            Path(folder, letter).write_text(letter * 50, encoding="utf-8")
        source = "+".join(str(Path(folder, letter)) for letter in "abcd"[:parts])
        batches = calibration_batches(TOKENIZER, source, nsamples, 8, share=share)
    texts = TOKENIZER.batch_decode(batches)
    assert len(texts) == nsamples and all(len(set(text)) == 1 for text in texts)
    first, *others = (sum(text[0] == letter for text in texts) for letter in "abcd"[:parts])
    assert max(others) - min(others) <= 1
    if nsamples >= parts:
        assert min(first, *others) >= 1
        wanted = min(max(nsamples * share, 1), nsamples - parts + 1)
        assert abs(first - wanted) <= 0.5


def test_a_mix_is_shuffled_by_its_seed(tmp_path):
    for letter in "ab":
        (tmp_path / letter).write_text(letter * 100, encoding="utf-8")
    source = f"{tmp_path / 'a'}+{tmp_path / 'b'}"
    orders = {"".join(TOKENIZER.batch_decode(calibration_batches(TOKENIZER, source, 12, 1, seed))) for seed in range(4)}
    assert len(orders) > 1 and all(order.count("a") == 6 for order in orders)
    assert not orders & {"aaaaaabbbbbb", "bbbbbbaaaaaa"}


def test_a_file_with_a_plus_in_its_name_is_one_source(tmp_path):
    (tmp_path / "c+d.txt").write_text("x" * 20, encoding="utf-8")
    assert calibration_batches(TOKENIZER, tmp_path / "c+d.txt", 2, 8).shape == (2, 8)


# --- a token that begins a text --------------------------------------------------------------------------------------


def test_sequences_begin_as_the_tokenizer_begins_a_text(text_file):
    """One BOS, then seqlen - 1 tokens of text, without a gap between windows."""
    begun = begins_texts(tiny_tokenizer())
    windows = token_windows(begun, text_file, 3, 16)
    assert windows[:, 0].tolist() == [begun.bos_token_id] * 3
    assert windows[:, 1:].flatten().tolist() == encode(text_file.read_text())[:45]
    drawn = calibration_batches(begun, text_file, 4, 16)
    assert torch.equal(drawn[:, 1:], calibration_batches(TOKENIZER, text_file, 4, 15))
    assert drawn[:, 0].tolist() == [begun.bos_token_id] * 4
    sampled = calibration_batches(begun, "self", 2, 16, model=tiny_model("llama"))
    assert torch.equal(sampled, calibration_batches(TOKENIZER, "self", 2, 16, model=tiny_model("llama")))
    with pytest.raises(EoraLabError, match=r"seqlen must be 2 or more.*<bos>"):
        token_windows(begun, text_file, 1, 1)


def test_the_token_that_begins_a_text_is_never_predicted(text_file):
    windows = token_windows(begins_texts(tiny_tokenizer()), text_file, 2, 16)
    model = tiny_model("llama")
    with torch.no_grad():
        likelihoods = model(windows).logits.log_softmax(-1)[:, :-1].gather(2, windows[:, 1:, None])
    assert perplexity(model, windows) == pytest.approx((-likelihoods.mean()).exp().item(), rel=1e-5)
    assert not (windows[:, 1:] == TOKENIZER.bos_token_id).any()


def test_a_prompt_begins_as_a_text_does():
    model, begun = tiny_model("llama"), begins_texts(tiny_tokenizer())
    assert generate(model, begun, "The fox", 8) == generate(model, TOKENIZER, "<bos>The fox", 8)
    assert generate(model, begun, "<bos>The fox", 8) == generate(model, TOKENIZER, "<bos>The fox", 8)


def test_commands_say_what_texts_begin_with(workplace, capsys):
    texts = ["--perplexity", "text.txt", "--windows", "2", "--window-length", "32"]
    assert main(["evaluate", "model", *texts]) == 0
    assert "begins with" not in capsys.readouterr().out
    begins_texts(tiny_tokenizer()).save_pretrained("model")
    assert main(["evaluate", "model", *texts]) == 0
    assert "every sequence begins with <bos>" in capsys.readouterr().out
    texts = ["--calibration.source", "text.txt", "--calibration.nsamples", "2", "--calibration.seqlen", "32"]
    small = ["--model", "model", "--group-size", "32", "--rank", "4", "--no-evaluate"]
    assert main(["compress", "run", *small, *texts]) == 0
    assert "every sequence begins with <bos>" in capsys.readouterr().out
    assert json.loads(Path("run/config.json").read_text())["settings"]["bos"] == "<bos>"


# --- text from the model itself ------------------------------------------------------------------------------------


def test_self_samples_with_its_own_seed():
    model = tiny_model("llama").train()
    before = torch.get_rng_state()
    drawn = [calibration_batches(TOKENIZER, "self", 10, 12, seed, model=model) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert drawn[0].shape == (10, 12)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert (drawn[0][:, 0] == TOKENIZER.bos_token_id).all()


def test_self_follows_the_model():
    model = tiny_model("llama")
    model.lm_head.weight.data *= 1e5  # so sure of itself that a sample is the argmax
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    tokens = calibration_batches(tokenizer, "self", 4, 16, model=model)
    assert len(tokens[:, 0].unique()) > 1  # random starts
    with torch.no_grad():
        assert torch.equal(model(tokens).logits.argmax(-1)[:, :-1], tokens[:, 1:])


def test_self_refuses_what_it_cannot_do():
    with pytest.raises(EoraLabError, match="pass model="):
        calibration_batches(TOKENIZER, "self", 1, 8)
    with pytest.raises(EoraLabError, match="at most 128 tokens"):
        calibration_batches(TOKENIZER, "self", 1, 129, model=tiny_model("llama"))
    model, longer = tiny_model("llama"), tiny_tokenizer()
    longer.add_special_tokens({"bos_token": "<new>"})
    with pytest.raises(EoraLabError, match="token id 97 has no row"):
        calibration_batches(longer, "self", 1, 8, model=model)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(EoraLabError, match="not finite"):
        calibration_batches(TOKENIZER, "self", 1, 8, model=model)
    with pytest.raises(EoraLabError, match="one source of text"):
        token_windows(TOKENIZER, "self")


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wikitext3", "unknown source 'wikitext3'.*arc, c4, gsm8k.*wikitext2.*, self"),
        ("pydoc+nope", "unknown source 'nope'"),
        ("pydoc+", "unknown source ''"),
        ("x" * 5000, "unknown source"),
        ("pydoc:test", "pydoc has no split 'test'; it has calibration and heldout"),
        ("c4:test", "c4 has no split 'test'; it has train and validation"),
        ("mmlu-exemplars:test", "mmlu-exemplars has no split 'test'"),
    ],
)
def test_unknown_sources_and_splits(source, message):
    with pytest.raises(EoraLabError, match=message) as error:
        calibration_batches(TOKENIZER, source, 1, 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nsamples": 0}, "nsamples must be"),
        ({"seqlen": 0}, "seqlen must be"),
        ({"nsamples": -3}, "nsamples must be"),
        ({"share": 0.0}, "share must lie between 0 and 1"),
        ({"share": 1.0}, "share must lie between 0 and 1"),
        ({"seqlen": 3001}, "3000 tokens, one window needs 3001"),
        ({"seqlen": 2999}, "2 distinct windows of 2999, not 4"),
    ],
)
def test_arguments_out_of_range(text_file, arguments, message):
    with pytest.raises(EoraLabError, match=message):
        calibration_batches(TOKENIZER, text_file, **({"nsamples": 4, "seqlen": 64} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be"),
        ({"seqlen": 0}, "seqlen must be"),
        ({"seqlen": 3001}, "3000 tokens, one window needs 3001"),
        ({"n": 6}, "3000 tokens, which is 5 windows of 512, not 6"),
    ],
)
def test_windows_out_of_range(text_file, arguments, message):
    with pytest.raises(EoraLabError, match=message):
        token_windows(TOKENIZER, text_file, **arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b" \n\n ", "holds no text"), (b"caf\xe9 au lait", r"not UTF-8 text \(byte 3\)")],
)
def test_unusable_files(text_file, content, message):
    text_file.write_bytes(content)
    for call in (lambda: calibration_batches(TOKENIZER, text_file, 1, 2), lambda: token_windows(TOKENIZER, text_file)):
        with pytest.raises(EoraLabError, match=message):
            call()
