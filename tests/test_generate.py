"""A model writes: the likeliest tokens and nothing else, and one clear line where it cannot."""

import io
import sys

import pytest
import torch
import transformers

from eora_lab import EoraLabError
from eora_lab.cli import main
from eora_lab.cli.chat import read_line
from eora_lab.model.generate import Chat, generate, generate_each
from eora_lab.model.steps import Steps, can_capture, write
from tests.tiny import tiny_model, tiny_tokenizer


def likeliest(model, tokenizer, prompt: str, tokens: int) -> str:
    """Greedy writing by hand, without a cache."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + tokens and (ids.shape[1] == start or ids[0, -1] != tokenizer.eos_token_id):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


OWN = [{}, {"return_dict_in_generate": True}, {"penalty_alpha": 0.6, "top_k": 4}, {"repetition_penalty": 9.0}]


@pytest.mark.parametrize("own", OWN, ids=str)
def test_the_settings_in_the_models_folder_bend_nothing(own):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for key, value in own.items():
        setattr(model.generation_config, key, value)
    before = model.generation_config.to_dict()
    assert generate(model, tokenizer, "The fox", 12) == likeliest(model, tokenizer, "The fox", 12)
    sampled = [generate(model, tokenizer, "The fox", 12, 2.0, seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert model.generation_config.to_dict() == before


PROMPTS = ["The fox", "The quick brown fox jumps over", "A"]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_prompts_of_a_batch_are_continued_as_each_alone(kind):
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    alone = [generate(model, tokenizer, prompt, 9) for prompt in PROMPTS]
    assert generate_each(model, tokenizer, PROMPTS, 9) == alone


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_steps_write_what_the_whole_model_writes(kind):
    """The steps that a GPU captures, called one by one: prompts of unequal length, and texts that end early."""
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(one)) + one for one in ids])
    mask = torch.arange(longest) >= torch.tensor([[longest - len(one)] for one in ids])
    rows = write(Steps(model, padded, mask, 9), [], 9).tolist()
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in rows] == [
        likeliest(model, tokenizer, prompt, 9) for prompt in PROMPTS
    ]
    for prompt in PROMPTS:  # alone, without anything to hide
        one = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        (row,) = write(Steps(model, one, torch.ones_like(one).bool(), 9), [], 9).tolist()
        assert tokenizer.decode(row, skip_special_tokens=True) == likeliest(model, tokenizer, prompt, 9)
    end = rows[0][2]
    first = rows[0].index(end) + 1
    stopped = write(Steps(model, padded, mask, 9), [end], 9).tolist()
    assert stopped[0] == rows[0][:first] + [end] * (len(stopped[0]) - first)
    sampled = []
    for _ in range(2):
        torch.manual_seed(3)
        sampled.append(write(Steps(model, padded, mask, 9), [], 9, temperature=2.0))
    assert torch.equal(*sampled) and sampled[0].tolist() != rows
    assert not can_capture(model)  # on a CPU


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, not 0"),
        ({"tokens": -4}, "tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0 .* or more, not -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 .*not nan"),
        ({"temperature": float("inf")}, "temperature must be 0 .*not inf"),
        ({"seed": 2**70}, "seed must be a number of 64 bits"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "caf\udce9"}, r"not UTF-8 \(at character 4\)"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(EoraLabError, match=message):
        generate(model, tokenizer, **{"prompt": "The fox"} | settings)


def test_tokens_that_the_model_cannot_take():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(EoraLabError, match="token id 97 has no row in the model's embedding of 97"):
        generate(tiny_model("llama"), tokenizer, "fox <new>")
    config = transformers.GPT2Config(vocab_size=97, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    generate(model, tokenizer, "The fox", 10)
    with pytest.raises(EoraLabError, match=r"takes at most 16 tokens at once .*not 17: .*fewer new tokens"):
        generate(model, tokenizer, "The fox", 11)


def test_end_tokens_that_are_none():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = "two"
    with pytest.raises(EoraLabError, match=r"eos_token_id in generation_config\.json must be token ids, not 'two'"):
        generate(model, tiny_tokenizer(), "The fox", 2)


def test_a_model_that_cannot_write():
    model = tiny_model("llama")
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(EoraLabError, match=r"the model cannot write: .*nan"):
        generate(model, tiny_tokenizer(), "The fox", 4, temperature=1.0)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only pictures') }}", "fails .*only pictures.*mend it"),
        ("{% if %}", "fails .*mend it"),
        ("{{ messages[0]['content'] + 1 }}", "fails .*mend it"),
        ("{# nothing #}", "(fails|makes nothing of the conversation).*mend it"),
    ],
)
def test_chat_templates_that_fail(template, message):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    chat = Chat(tiny_model("llama"), tokenizer, 4)
    with pytest.raises(EoraLabError, match=f"the chat template of the model's tokenizer {message}"):
        chat.reply("Hello")
    assert chat.messages == []


def test_a_conversation():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    model = tiny_model("llama")
    chat = Chat(model, tokenizer, 6)
    assert chat.reply("Hello") == likeliest(model, tokenizer, "Hello\n", 6)
    with pytest.raises(EoraLabError, match="not UTF-8"):
        chat.reply("caf\udce9")
    with pytest.raises(EoraLabError, match="tokens must be at least 1"):
        Chat(model, tokenizer, 0)


def test_what_the_terminal_cannot_read_or_show(workplace, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(EoraLabError, match="the input is not UTF-8 text"):
        read_line("> ")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="latin-1"))
    assert main(["generate", "model", "\u65e5 fox", "--tokens", "2"]) == 0
    sys.stdout.flush()
    assert shown.getvalue().startswith(rb"\u65e5 fox")
