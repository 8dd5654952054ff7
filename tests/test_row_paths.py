"""A low-rank path for each text of a batch: layers, models, the commands."""

import pytest
import torch

from eora_lab import EoraLabError, load_model
from eora_lab.cli import main
from eora_lab.cli.chat import each
from eora_lab.layer.linear import compensated
from eora_lab.layer.row_paths import RowPaths
from eora_lab.model.generate import Chat
from eora_lab.run.adapters import Adapters
from tests.test_linear import layer
from tests.tiny import compress, save_tiny, tiny_model, tiny_tokenizer, tiny_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_every_text_takes_its_own_path(dtype, tokens):
    module, generator = layer(rank=0, dtype=dtype), torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    paths = [(random(rank, 128) / 16, random(96, rank)) for rank in (3, 0, 20)]
    ids, x = [2, -1, 0, 1, 2, 0], random(6, tokens, 128)
    plain = module(x).double()
    module.set_row_paths(RowPaths.of(paths, ids, module.lora_A))
    y = module(x).double()
    for i, path in enumerate(ids):
        A, B = paths[path] if path >= 0 else (random(0, 128), random(96, 0))
        exact = plain[i] + x[i].double() @ A.double().T @ B.double().T
        assert (y[i] - exact).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * exact.norm()
    for strange in (x[:5], x.flatten(0, 1)):  # another batch; rows of which nobody says whose they are
        with pytest.raises(EoraLabError, match="one adapter at a time"):
            module(strange)
    module.set_row_paths(None)
    assert torch.equal(module(x).double(), plain)


@pytest.fixture(scope="module")
def adapters():
    """Of a compressed model: its own and two more."""
    model = tiny_model("llama")
    compress(model, tiny_tokens(), rank=8, progress=False)
    found = Adapters(model)
    for name, rank in (("a", 3), ("b", 12)):
        generator = torch.Generator().manual_seed(rank)
        draw = lambda *shape, generator=generator: torch.randn(shape, generator=generator) / 8  # noqa: E731
        layers = compensated(model).items()
        found.add(name, {key: (draw(rank, one.in_features), draw(one.out_features, rank)) for key, one in layers})
    return found


@torch.no_grad()
def test_a_batch_of_a_model_is_its_texts_one_by_one(adapters):
    names = ["a", None, "own", "b", "a"]
    tokens = tiny_tokens(5, seed=3)
    alone = []
    for name, text in zip(names, tokens, strict=True):
        adapters.use(name)
        alone.append(adapters.model(text[None]).logits[0])
    adapters.use("own")
    with adapters.batch(names):
        together = adapters.model(tokens).logits
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-4)
    assert adapters.active == "own" and all(one.row_paths is None for one in compensated(adapters.model).values())
    torch.testing.assert_close(adapters.model(tokens[2:3]).logits[0], alone[2])
    with pytest.raises(EoraLabError, match="no adapter 'c'"), adapters.batch(["c"]):
        pass


def test_the_commands_ask_every_adapter_at_once(adapters, tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = Chat(adapters.model, tokenizer, tokens=6)
    alone = {}
    for name in (*adapters.names, None):
        adapters.use(name)
        alone[name or "off"] = chat.reply("The fox")
        chat.reset()
    adapters.use("own")
    each(adapters, chat, "The fox")
    assert capsys.readouterr().out == "".join(f"{name}> {answer}\n" for name, answer in alone.items())
    assert not chat.messages and adapters.active == "own"

    model, _ = load_model(save_tiny(tmp_path / "model"))
    compress(model, tiny_tokens(), rank=8, progress=False, folder=tmp_path / "run")
    command = ["generate", str(tmp_path / "run"), "The", "--tokens", "5", "--device", "cpu", "--adapter"]
    assert main([*command, "own"]) == main([*command, "off"]) == main([*command, "own", "off"]) == 0
    own, off, *both = capsys.readouterr().out.splitlines()
    assert both == [f"[own] {own}", f"[off] {off}"]
