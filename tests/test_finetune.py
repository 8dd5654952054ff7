"""Fine-tuning on a frozen compressed model: what gets gradients, what it starts from, resuming, what it writes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F

from eora_lab import EoraLabError, load_model, load_run, perplexity
from eora_lab.cli import main
from eora_lab.files import locked
from eora_lab.finetune.checkpoints import last_checkpoint
from eora_lab.finetune.finetune import finetune
from eora_lab.finetune.settings import Training
from eora_lab.finetune.trainer import FrozenLinear, train
from eora_lab.formats.peft import read_adapter
from eora_lab.layer.linear import CompensatedLinear
from eora_lab.run.adapters import Adapters, use_only
from eora_lab.run.folder import load_original
from eora_lab.run.recipe import Recipe
from eora_lab.run.task_adapter import solve_adapter
from tests.tiny import compress, full_disk, tiny_model, tiny_tokenizer

SHORT = Training(steps=6, batch_size=2, lr=1e-2, save_every=3)
LONG = Training(steps=9, batch_size=2, lr=1e-2, save_every=3)


def batches(n: int = 8, seqlen: int = 32, seed: int = 0) -> torch.Tensor:
    """Sequences that count upwards from a random token: there is something to learn."""
    start = torch.randint(3, 97, (n, 1), generator=torch.Generator().manual_seed(seed))
    return 3 + (start + torch.arange(seqlen)) % 94


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of a tiny model with biases, whose compressed weights are coarse and have no path."""
    folder = tmp_path_factory.mktemp("finetune")
    tiny_model("qwen2").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    model, _ = load_model(folder / "model")
    settings = {"bits": 2, "group_size": 32, "method": "none", "rank": 0}
    compress(model, batches(), **settings, folder=folder / "run", progress=False)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return folder / "run"


def loaded(run):
    return load_run(run)[0], load_original(run)


def held_out(log: list[dict]) -> list[float]:
    return [entry["eval_loss"] for entry in log if "eval_loss" in entry]


def loss(model, tokens=None) -> float:
    return math.log(perplexity(model, batches(seed=1) if tokens is None else tokens))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_packed_weight_passes_gradients_on_and_takes_none(bits):
    """What peft wraps has no parameters; the gradient of its input is that of the dense product."""
    model = tiny_model("qwen2")
    compress(model, batches(), bits=bits, group_size=32, method="none", rank=0, progress=False)
    layer = next(m for m in model.modules() if isinstance(m, CompensatedLinear) and m.bias is not None)
    frozen = FrozenLinear(layer)
    assert not list(frozen.parameters())
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    weight = torch.randn(3, 5, layer.out_features)
    (frozen(x) * weight).sum().backward()
    torch.testing.assert_close(frozen(x), F.linear(x, layer.compressed.dense(), layer.bias), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.grad, weight @ layer.compressed.dense(), rtol=0, atol=1e-5)


def test_training_is_that_of_a_dense_model_in_peft(run, tmp_path):
    """The factors after some steps are those of plain peft and AdamW on W^ as dense weights, same data order."""
    training = Training(steps=4, batch_size=8, lr=1e-2, save_every=4)  # one batch holds all, so order does not matter
    model, original = loaded(run)
    start = solve_adapter(model, original, batches(), Recipe(rank=4), progress=False)
    factors, log = train(model, start, 4, batches(), batches(seed=1), tmp_path, training, 0, None)

    dense, packed = tiny_model("qwen2"), load_run(run)[0]
    for name in start:
        dense.get_submodule(name).weight.data.copy_(packed.get_submodule(name).compressed.dense())
    plain = peft.get_peft_model(dense, peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(start)))
    halves = {name: plain.base_model.model.get_submodule(name) for name in start}
    for name, (A, B) in start.items():
        halves[name].lora_A["default"].weight.data.copy_(A)
        halves[name].lora_B["default"].weight.data.copy_(B)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], weight_decay=0.0)
    losses = []
    for lr in (0, *(1e-2 * (1 + math.cos(math.pi * k / 3)) / 2 for k in range(3))):  # one step of warm-up, a cosine
        optimizer.param_groups[0]["lr"] = lr
        value = plain(input_ids=batches(), labels=batches()).loss
        value.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert [entry["loss"] for entry in log if "loss" in entry] == pytest.approx(losses, rel=1e-4)
    for name, (A, B) in factors.items():
        moved = (B @ A - start[name][1] @ start[name][0]).norm()
        plain_B, plain_A = halves[name].lora_B["default"].weight, halves[name].lora_A["default"].weight
        assert moved > 0 and (B @ A - plain_B @ plain_A).norm() < 0.02 * moved


@pytest.mark.parametrize("init", ["eora", "svd", "lora"])
def test_a_start_is_what_it_says_and_the_trained_adapter_is_what_was_measured(run, init, tmp_path):
    model, original = loaded(run)
    state = {name: tensor.clone() for name, tensor in model.named_parameters()}
    packed = {n: (m, m.codes) for n, m in model.named_modules() if isinstance(m, CompensatedLinear)}
    log = finetune(model, original, batches(), batches(seed=1), tmp_path / "out", SHORT, init, 8)
    values = held_out(log)
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [0, 3, 6]
    assert values[-1] < values[0]

    fresh, _ = loaded(run)
    Adapters(fresh).use(None)
    if init != "lora":
        solve_adapter(fresh, original, batches(), Recipe(method=init, rank=8), progress=False)
    assert values[0] == pytest.approx(loss(fresh), abs=1e-4)

    use_only(fresh, tmp_path / "out")
    assert values[-1] == pytest.approx(loss(fresh), abs=2e-3) == pytest.approx(loss(model), abs=2e-3)  # in 16 bits
    dense = tiny_model("qwen2")
    for name, (layer, codes) in packed.items():
        assert model.get_submodule(name) is layer and layer.codes is codes  # frozen, and back in its place
        dense.get_submodule(name).weight.data.copy_(layer.dense())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.named_parameters())
    elsewhere = peft.PeftModel.from_pretrained(dense, tmp_path / "out").eval()
    assert loss(elsewhere) == pytest.approx(loss(fresh), abs=1e-5)
    _, config = read_adapter(tmp_path / "out")
    assert config["r"] == config["lora_alpha"] == 8 and Path(config["base_model_name_or_path"]) == run.parent / "model"


def test_starts_differ_in_their_first_step_only_by_the_start(run, tmp_path):
    """Same seed, same data: the order of the batches does not depend on the start."""
    model, original = loaded(run)
    orders = {}
    for init in ("eora", "lora"):
        seen = orders.setdefault(init, [])
        hook = model.get_input_embeddings().register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].clone()) if torch.is_grad_enabled() else None
        )
        finetune(model, original, batches(), batches(seed=1), tmp_path / init, SHORT, init, 8)
        hook.remove()
    assert len(orders["eora"]) == len(orders["lora"]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*orders.values(), strict=True))


KILLED = """
import torch
from tests.test_finetune import batches, loaded
from eora_lab.finetune.finetune import finetune
from eora_lab.finetune.settings import Training
torch.set_num_threads(1)
finetune(*loaded({run!r}), batches(), batches(seed=1), {out!r}, Training(**{training!r}), "eora", 8)
"""


def test_a_killed_training_resumes_to_the_same_result(run, tmp_path):
    """SIGKILL in the middle, and the newest checkpoint torn: it goes on from the one before, to the same bytes."""
    settings = {"steps": 24, "batch_size": 2, "lr": 1e-3, "save_every": 3}
    script = KILLED.format(run=str(run), out=str(tmp_path / "killed"), training=settings)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while (checkpoint := last_checkpoint(tmp_path / "killed", 24)) is None or checkpoint.name == "checkpoint-3":
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "log.json").exists()
    newest = last_checkpoint(tmp_path / "killed", 24)
    (newest / "trainer_state.json").write_text('{"epoch": 1.0, "glo')
    assert last_checkpoint(tmp_path / "killed", 24) not in (None, newest)
    logs = {}
    for name in ("killed", "whole"):
        logs[name] = finetune(
            *loaded(run), batches(), batches(seed=1), tmp_path / name, Training(**settings), "eora", 8
        )
    assert logs["killed"] == logs["whole"] and len(held_out(logs["whole"])) == 9
    first, second = (read_adapter(tmp_path / name)[0] for name in logs)
    for name in first:
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True))


def test_a_finished_training_is_not_run_again(run, tmp_path):
    model, original = loaded(run)
    arguments = (model, original, batches(), batches(seed=1), tmp_path / "out", SHORT, "svd", 8)
    log = finetune(*arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert finetune(*arguments) == log
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def break_state(checkpoint) -> None:
    state = checkpoint / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 6', '"global_step": 2'))


DAMAGES = {
    "cut off": lambda checkpoint: (checkpoint / "optimizer.pt").write_bytes(b"PK"),
    "a byte": lambda checkpoint: (checkpoint / "optimizer.pt").write_bytes(
        (data := (checkpoint / "optimizer.pt").read_bytes())[: len(data) // 2] + b"!" + data[len(data) // 2 + 1 :]
    ),
    "gone": lambda checkpoint: (checkpoint / "scheduler.pt").unlink(),
    "weights": lambda checkpoint: (checkpoint / "adapter_model.safetensors").write_bytes(b""),
    "empty": lambda checkpoint: (checkpoint / "rng_state.pth").write_bytes(b""),
    "another step": break_state,
    "best": lambda checkpoint: checkpoint.rename(checkpoint.with_name("checkpoint-best")),
}


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A folder of a finished training, and its log."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    return folder, finetune(*loaded(run), batches(), batches(seed=1), folder, LONG, "svd", 8)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_to_the_same_result(run, trained, damage, tmp_path):
    folder, log = shutil.copytree(trained[0], tmp_path / "out"), trained[1]
    whole = read_adapter(folder)[0]
    (folder / "log.json").unlink()
    assert last_checkpoint(folder, 10).name == "checkpoint-9" and last_checkpoint(folder, 9).name == "checkpoint-6"
    DAMAGES[damage](folder / "checkpoint-6")
    assert last_checkpoint(folder, 9) is None
    assert finetune(*loaded(run), batches(), batches(seed=1), folder, LONG, "svd", 8) == log
    for name, pair in read_adapter(folder)[0].items():
        assert all(torch.equal(a, b) for a, b in zip(pair, whole[name], strict=True))


@pytest.mark.parametrize("content", ["", "[]", '[{"step": 1, "lo', "{}", '[{"step": 1, "loss": "low"}]', "[1, 2]"])
def test_a_damaged_log_is_one_line_and_made_again_when_it_is_deleted(run, trained, content, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "out")
    (folder / "log.json").write_text(content)
    arguments = (*loaded(run), batches(), batches(seed=1), folder, LONG, "svd", 8)
    with pytest.raises(EoraLabError, match=r"out/log\.json .*; delete it, and start the training again"):
        finetune(*arguments)
    if content == "":
        (folder / "log.json").unlink()
        assert finetune(*arguments) == trained[1]


@pytest.mark.parametrize("size", [20_000, 150_000])
def test_a_full_disk_is_one_line_and_the_training_goes_on_when_there_is_room(run, trained, size, tmp_path):
    """The smaller limit to the size of a file stops the factors, the other one the state of the optimizer."""
    arguments = (batches(), batches(seed=1), tmp_path / "out", LONG, "svd", 8)
    model, original = loaded(run)
    with full_disk(size), pytest.raises(EoraLabError, match=r"cannot write .*out.*make room") as caught:
        finetune(model, original, *arguments)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name != ".lock"]
    assert finetune(model, original, *arguments) == trained[1]


def test_two_trainings_cannot_share_a_folder(run, tmp_path):
    model, original = loaded(run)
    arguments = (batches(), batches(seed=1), tmp_path / "out", LONG, "lora", 8)
    with locked(tmp_path / "out"), pytest.raises(EoraLabError, match=r"somebody is at work in .*out"):
        finetune(model, original, *arguments)
    assert finetune(model, original, *arguments)


TEXTS = {"source": "text.txt", "nsamples": 6, "seqlen": 32, "rank": 8, "steps": 4, "save-every": 2, "batch-size": 2}
TEXTS |= {"lr": 1e-3, "evaluation.perplexity": "text.txt", "evaluation.windows": 2, "evaluation.window-length": 32}
TEXTS = [word for key, value in TEXTS.items() for word in (f"--{key}", str(value))]


def test_the_command_compares_starts_and_its_adapters_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    out = str(tmp_path / "tuned")
    assert main(["finetune", "run", out, "--init", "eora", "svd", "lora", *TEXTS]) == 0
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[0].split()[0] == "start" and [row.split()[0] for row in table[1:]] == ["eora", "svd", "lora"]
    for row in table[1:]:
        init, *losses = row.split()
        log = json.loads((tmp_path / "tuned" / init / "log.json").read_text())
        assert float(losses[-1]) == pytest.approx(held_out(log)[-1], abs=1e-4)
        assert main(["adapter", "check", f"{out}/{init}"]) == 0
        capsys.readouterr()
        text = ["--perplexity", "text.txt", "--windows", "2", "--window-length", "32"]
        assert main(["evaluate", "run", "--adapter", f"{out}/{init}", *text]) == 0
        assert float(capsys.readouterr().out.split()[1]) == pytest.approx(math.exp(float(losses[-1])), rel=2e-3)
    assert main(["finetune", "run", out, *TEXTS, "--steps", "5"]) == 1
    assert "holds another run (steps was 4, now 5)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone", "out"], "not a run folder"),
        (["run", "model"], "not empty and holds no run"),
        (["run", "out", "--steps", "0"], "must be at least 1"),
        (["run", "out", "--lr", "-1"], "learning rate above 0"),
        (["run", "out", "--rank", "0"], "rank must be at least 1"),
        (["run", "out", "--rank", "65"], "rank 65 is larger than any layer allows"),
        (["run", "out", "--source", "wikipedia"], "unknown source"),
        (["run", "out", "--init", "lora", "--lr", "1e38"], "no longer finite"),
    ],
)
def test_errors_are_one_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(run.parent)
    arguments = [str(tmp_path / "out") if argument == "out" else argument for argument in arguments]
    assert main(["finetune", *arguments[:2], *TEXTS, *arguments[2:]]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eora-lab: ")]
    assert message in line
