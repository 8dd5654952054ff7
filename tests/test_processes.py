"""Several processes give what one gives; whatever happens to one of them ends all, and the run goes on later."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from eora_lab import EoraLabError, Recipe, compress_model, load_model
from eora_lab.calibrate.processes import Processes, group
from eora_lab.cli import main
from eora_lab.layer.linear import compensated
from eora_lab.run.budget import Budget
from eora_lab.run.fit import Steps
from eora_lab.run.folder import read_report
from eora_lab.run.owners import pack
from eora_lab.run.report import Report
from tests.processes import codes, results, said, started
from tests.test_experts import mixture
from tests.tiny import SMALL, calibrated, compress, full_disk, save_tiny, tiny_model, tiny_tokens

GPTQ = SMALL | {"compressor": "gptq"}
EXPERTS = {"num_local_experts": 12, "num_experts_per_tok": 1}  # few tokens come to each, of some processes none


def models(kind: str) -> torch.nn.Module:
    return mixture(**EXPERTS) if kind == "experts" else tiny_model(kind)


def given_weights(model: torch.nn.Module) -> dict:
    """W^ of all linears, rounded to nearest elsewhere."""
    other = tiny_model("llama")
    compress(other, tiny_tokens(), **SMALL, method="none")
    return {name: layer.compressed for name, layer in compensated(other).items()}


PASSES = {
    "held out": ("llama", GPTQ | {"held_out": 0.25, "shrink": True}),
    "true_sequential": ("qwen2", GPTQ | {"true_sequential": True}),
    "original inputs": ("gemma", GPTQ | {"inputs": "original"}),
    "experts": ("experts", GPTQ | {"held_out": 0.25, "rank": 4}),
    "experts, one input at a time": ("experts", SMALL | {"true_sequential": True, "rank": 4}),
    "gradients": ("llama", SMALL | {"method": "eora_fisher", "held_out": 0.25}),
    "gradients of experts": ("experts", SMALL | {"method": "eora_fisher", "rank": 4}),
    "a budget": ("llama", GPTQ | {"inputs": "original", "ranks": Budget("relative", multiple=2)}),
    "a budget in nats": ("llama", SMALL | {"method": "eora_fisher", "ranks": Budget("nats", multiple=2)}),
    "one A for several": (
        "llama",
        SMALL | {"method": "eora_fisher", "shared_factors": True, "ranks": Budget("nats", multiple=2)},
    ),
    "given weights": ("llama", SMALL | {"weights": given_weights, "reround": True, "rounds": 2}),
}


def passes(names: list[str]) -> dict[str, tuple[dict, Report]]:
    """What these passes leave: tensors of the layers by name, and the report."""
    found = {}
    with group("cpu"):
        for name in names:
            kind, settings = PASSES[name]
            model = models(kind)
            if make := settings.get("weights"):
                settings = settings | {"weights": make(model)}
            report = compress(model, tiny_tokens(18), **settings)
            found[name] = {key: layer.stored() for key, layer in compensated(model).items()}, report
    return found


def lines(report: Report) -> list[dict]:
    """The report without what times and memory are."""
    return [asdict(replace(layer, seconds_compress=0.0, seconds_solve=0.0)) for layer in report.layers]


@pytest.fixture(scope="module")
def one_process():
    torch.set_num_threads(1)
    return passes(list(PASSES))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return results(2, tmp_path_factory.mktemp("two"), passes, list(PASSES))


def same(one: tuple[dict, Report], other: tuple[dict, Report]) -> None:
    assert list(one[0]) == list(other[0])
    for name, tensors in one[0].items():
        assert tensors.keys() == other[0][name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, other[0][name][key]), f"{name}.{key}"
    assert lines(one[1]) == lines(other[1])


@pytest.mark.parametrize("name", PASSES)
def test_two_processes_end_with_the_bits_of_one(name, one_process, two_processes):
    for found in two_processes:
        same(one_process[name], found[name])


def test_processes_that_have_no_texts_help_too(one_process, tmp_path):
    names = ["held out", "experts"]
    for found in results(6, tmp_path, passes, names):  # of 5 mini-batches
        for name in names:
            same(one_process[name], found[name])


class Doomed(Steps):
    """Steps of a process that meets with something in the second block."""

    def compress(self, name, weight, statistics):
        if name.startswith("model.layers.1."):
            self.end(name)
        return super().compress(name, weight, statistics)


def killed(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refused(name: str) -> None:
    raise EoraLabError(f"{name} is odd")


def broken(name: str) -> None:
    raise ZeroDivisionError(name)


def run_into(model: str, folder: Path, victim: int | None = None, end=killed, hidden_states: str = "memory") -> None:
    """A pass into a run folder; in process `victim` it ends as said."""
    with group("cpu"):
        recipe = Recipe("gptq", bits=3, group_size=32, rank=8)
        steps = Doomed(recipe) if Processes.of_group().rank == victim else Steps(recipe)
        steps.end = end
        settings = {"folder": folder, "steps": steps, "hidden_states": hidden_states, "progress": False}
        compress_model(load_model(model)[0], tiny_tokens(18), recipe, **settings)


def same_folders(one: Path, other: Path) -> None:
    """Two run folders hold the same, but for times and memory, and the order of the metadata in files."""
    files = [path.relative_to(one) for path in sorted(one.rglob("*.safetensors"))]
    assert files == [path.relative_to(other) for path in sorted(other.rglob("*.safetensors"))] and len(files) == 3
    for file in files:
        tensors, others = load_file(one / file), load_file(other / file)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items()), file
    assert lines(read_report(one)) == lines(read_report(other))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    run_into(save_tiny(place / "model"), place / "run")
    return place


@pytest.mark.parametrize("victim, hidden_states", [(0, "disk"), (1, "memory")])
def test_a_run_goes_on_after_kill_9_of_a_process(victim, hidden_states, undisturbed, tmp_path):
    model, folder = str(undisturbed / "model"), tmp_path / "run"
    with started(2, tmp_path / "first", run_into, model, folder, victim, killed, hidden_states) as processes:
        ended = codes(processes)
    assert ended[victim] == -signal.SIGKILL and ended[1 - victim] == 1
    assert "another process of this run has ended" in said(tmp_path / "first", 1 - victim)
    (first,) = (folder / "blocks").glob("[!.]*")
    before = first.read_bytes()
    kept = sorted(path.relative_to(folder).as_posix() for path in folder.glob("hidden/*/*"))
    assert kept == (["hidden/process-0-of-2/001", "hidden/process-1-of-2/001"] if hidden_states == "disk" else [])
    results(2, tmp_path / "again", run_into, model, folder, None, killed, hidden_states)
    assert first.read_bytes() == before
    same_folders(folder, undisturbed / "run")
    assert not (folder / "hidden").exists()


def test_a_run_begun_by_many_is_ended_by_one(undisturbed, tmp_path):
    model, folder = str(undisturbed / "model"), tmp_path / "run"
    with started(2, tmp_path / "first", run_into, model, folder, 1, refused) as processes:
        assert codes(processes) == [1, 1]
    run_into(model, folder)
    same_folders(folder, undisturbed / "run")


@pytest.mark.parametrize("end, message", [(refused, "_proj is odd"), (broken, "ZeroDivisionError: model.layers.1.")])
def test_what_fails_in_one_process_is_said_by_the_first(end, message, undisturbed, tmp_path):
    with started(2, tmp_path / "both", run_into, str(undisturbed / "model"), tmp_path / "run", 1, end) as processes:
        assert codes(processes) == [1, 1]
    last = said(tmp_path / "both", 0).splitlines()[-1]
    assert last.startswith("eora_lab.errors.EoraLabError: process 1 of 2: ") and message in last


def unlike(what: str) -> str:
    """The line that a pass ends with which the processes are not asked for alike, or cannot share."""
    with group("cpu"):
        model = tiny_model("llama")
        before = [parameter.clone() for parameter in model.parameters()]
        seed = Processes.of_group().rank if what == "tokens" else 0
        settings = {"drift": {"inputs": "drift", "held_out": 0.25}, "distil": {"distil": True, "held_out": 0.25}}
        try:
            compress(model, tiny_tokens(18, seed=seed), **SMALL, **settings.get(what, {}))
        except EoraLabError as error:
            assert all(map(torch.equal, before, model.parameters()))
            return str(error)
    return ""


@pytest.mark.parametrize(
    "what, message",
    [
        ("tokens", "the processes were handed different things: tokens in process 1 is not that of 0"),
        ("drift", 'inputs="drift" runs in one process: take "compensated", or start it without torchrun'),
        ("distil", "distil runs in one process: leave it out, or start it without torchrun"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_changed(what, message, tmp_path):
    assert results(2, tmp_path, unlike, what) == [message] * 2


def command(folder: Path, arguments: list[str], trouble: str = "") -> int:
    """The exit code of a command in that folder; in trouble, one process is elsewhere, or can write next to nothing."""
    os.chdir(folder.parent if trouble == f"elsewhere {os.environ['RANK']}" else folder)
    with full_disk(20_000) if trouble == f"full {os.environ['RANK']}" else nullcontext():
        return main(arguments)


ONES = ["--model", "model", "--bits", "3", "--group-size", "32", "--rank", "4", "--evaluation.windows", "3"]
ONES += ["--evaluation.perplexity", "text.txt", "--evaluation.window-length", "32", *calibrated("text.txt", 18)]
STORED = ["--compressor", "rtn", "--zero-point", "integer", "--scale-dtype", "float16"]


@pytest.mark.parametrize(
    "trouble, line",
    [
        ("elsewhere 1", "eora-lab: process 1 of 2: "),
        ("full 0", "eora-lab: cannot write run/blocks/000.safetensors: "),
    ],
)
def test_a_command_that_one_process_cannot_do_ends_with_one_line(trouble, line, workplace):
    assert results(2, workplace / "out", command, workplace, ["compress", "run", *ONES], trouble) == [1, 1]
    assert said(workplace / "out", 1) == ""
    printed = [text for text in said(workplace / "out", 0).replace("\r", "\n").splitlines() if "eora-lab:" in text]
    assert len(printed) == 1 and line in printed[0]


def test_mend_is_shared_too_and_other_commands_are_not(workplace):
    assert main(["compress", "base", *ONES, *STORED, "--no-evaluate"]) == 0
    assert main(["export", "base", "checkpoint", "--format", "gptq_v2"]) == 0
    arguments = ["--model", "model", "--rank", "4", "--no-evaluate", *calibrated("text.txt", 18)]
    assert main(["mend", "checkpoint", "one", *arguments]) == 0
    assert results(2, workplace / "out", command, workplace, ["mend", "checkpoint", "two", *arguments]) == [0, 0]
    same_folders(workplace / "two", workplace / "one")
    assert results(2, workplace / "models", command, workplace, ["models"]) == [1, 1]
    assert "only compress and mend run in several processes" in said(workplace / "models", 0)


def test_torchrun_gives_the_files_of_one_process(workplace):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    shared = [*launcher, "-m", "eora_lab.cli", "compress", "two", *ONES]
    done = subprocess.run(shared, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote two") == 1
    assert main(["compress", "one", *ONES]) == 0
    same_folders(workplace / "two", workplace / "one")
    assert read_report("two").losses == read_report("one").losses


@given(st.lists(st.floats(0, 1e12), max_size=20), st.integers(1, 5))
def test_no_bin_holds_more_than_its_share_and_one_item(costs, count):
    named = {str(i): cost for i, cost in enumerate(costs)}
    found = pack(named, count)
    assert found.keys() == named.keys() and set(found.values()) <= set(range(count))
    loads = [sum(named[name] for name in named if found[name] == number) for number in range(count)]
    assert max(loads) <= (sum(costs) / count + max(costs, default=0)) * (1 + 1e-9)


def test_costs_are_packed_the_largest_first():
    assert pack({"a": 3.0, "b": 5.0, "c": 4.0, "d": 4.0, "e": 2.0}, 2) == {"b": 0, "c": 1, "d": 1, "a": 0, "e": 0}
