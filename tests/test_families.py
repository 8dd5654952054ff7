"""The page of families: it is what the record gives, and the check behind it sees what is wrong."""

import pytest
import torch

from docs.families import families, in_a_process, to_try
from docs.family_check import MAPPINGS, Subject, Wrong, build, check, compress, load, run_folder
from docs.family_page import PAGE, page
from docs.family_record import WORDS, Family, keep, read
from docs.shrink import default_config, shrink
from eora_lab.compensate import SOLVERS, LowRank

TEXT, IMAGE = MAPPINGS
RIGHT = {"coverage": 1.0, "logits": {"rtn": [0.2, 0.1]}}


def test_the_page_is_what_is_recorded():
    assert PAGE.read_text(encoding="utf-8") == page(read())


# dense with grouped heads, fused queries, sliding windows, biases with a parallel block, attention beside a state space
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt_neox", "bamba"])
def test_families_that_are_handled_fully(tmp_path, name):
    seen = check(TEXT, name, tmp_path)
    assert (seen.verdict, seen.reason) == ("full", "")
    assert seen.whole and all(eora < none for none, eora in seen.logits.values()) and len(seen.logits) == 3


def test_a_family_that_is_none_of_decoders(tmp_path):
    seen = check(TEXT, "bert", tmp_path)
    assert seen.verdict == "refused" and "needs a decoder-only language model" in seen.reason
    assert not seen.decoder_only and str(tmp_path) not in seen.reason


def test_a_family_that_needs_more_than_text(tmp_path):
    seen = check(IMAGE, "blip", tmp_path)
    assert seen.verdict == "not built" and "pixel_values" in seen.reason


def test_an_adapter_that_peft_gets_wrong_as_foreseen(tmp_path):
    seen = check(TEXT, "dbrx", tmp_path)
    assert seen.verdict == "no adapter" and "cannot wrap transformer.blocks.0.ffn.experts" in seen.reason


def test_what_is_wrong_is_seen(tmp_path):
    subject = Subject(Family(TEXT, "llama"), tmp_path)
    for step in (build, load, compress, run_folder):
        step(subject)
    subject.reference += 0.001 * torch.randn(subject.reference.shape)
    with pytest.raises(Wrong, match="logits of the loaded model are off"):
        load(subject)
    logits = torch.load(tmp_path / "logits.pt")
    logits[0, 0, 0] = torch.nextafter(logits[0, 0, 0], torch.tensor(torch.inf))
    torch.save(logits, tmp_path / "logits.pt")
    with pytest.raises(Wrong, match="logits of the run folder are off"):
        run_folder(subject)


def test_a_solver_that_does_harm_is_seen(tmp_path, monkeypatch):
    def away(residual, statistics, rank):
        found = SOLVERS["svd"](residual, statistics, rank)
        return LowRank(-found.A, found.B, found.spectrum)

    monkeypatch.setitem(SOLVERS, "eora", away)
    seen = check(TEXT, "llama", tmp_path)
    assert seen.verdict == "wrong" and list(seen.wrong) == ["compress"]
    assert all(compressor in seen.reason for compressor in ("rtn", "gptq", "wanda"))


def test_a_family_that_takes_too_long():
    seen = in_a_process(TEXT, "llama", 0.01)
    assert seen.verdict == "error" and "took more than" in seen.reason


@pytest.mark.parametrize(
    ("seen", "verdict", "reason"),
    [
        (RIGHT, "full", ""),
        (RIGHT | {"coverage": 0.9}, "partial", ""),
        (RIGHT | {"coverage": 0.9, "no_adapter": "peft: no"}, "no adapter", "peft: no"),
        (
            RIGHT | {"no_adapter": "no", "wrong": {"load": "off", "compress": "worse"}},
            "wrong",
            "load: off; compress: worse",
        ),
        (
            RIGHT | {"wrong": {"load": "off"}, "errors": {"statistics": "KeyError: x"}},
            "error",
            "statistics: KeyError: x",
        ),
        ({"refused": "it is quantised"}, "refused", "it is quantised"),
        ({"not_built": "TypeError"}, "not built", "TypeError"),
    ],
)
def test_the_worst_that_holds_is_the_verdict(seen, verdict, reason):
    one = Family(TEXT, "llama", **seen)
    assert (one.verdict, one.reason) == (verdict, reason) and verdict in WORDS
    assert Family.from_line(one.to_line()) == one
    assert f"| llama |  | {verdict} |" in page({(TEXT, "llama"): one})


def test_families_that_are_recorded_are_not_tried_again(tmp_path):
    record, chosen = tmp_path / "record.jsonl", families("text", [])
    assert to_try(chosen, record) == chosen and len(chosen) > 150
    keep(Family(TEXT, "llama", refused="first"), record)
    keep(Family(TEXT, "qwen3", versions={"torch": "1.0"}), record)
    keep(Family(TEXT, "llama"), record)
    assert to_try(chosen, record) == [one for one in chosen if one != (TEXT, "llama")]
    assert list(read(record)) == [(TEXT, "llama"), (TEXT, "qwen3")] and not read(record)[TEXT, "llama"].refused


def test_an_unknown_family_is_named():
    with pytest.raises(SystemExit, match="no such family: lama"):
        families(None, ["llama", "lama"])


def test_small_configurations_have_every_kind_of_layer():
    kinds = 0
    for name in MAPPINGS[TEXT][0]:
        if name == "gemma4_assistant":  # has no default configuration
            continue
        whole = default_config(name)
        small = shrink(whole)
        for field in ("layer_types", "mlp_layer_types", "layers_block_type"):
            every = set(getattr(whole, field, None) or ())
            assert set(getattr(small, field, None) or ()) >= every, f"{name}: {field}"
            kinds += len(every) > 1
        assert getattr(small, "hidden_size", 64) <= 64 and getattr(small, "num_hidden_layers", 2) <= 6, name
    assert kinds > 40
