"""A mixture that was trained, so that its routing means something, and whose router starves two of eight experts."""

import pytest
import torch
import transformers

from eora_lab import collect_statistics, output_energy
from eora_lab.calibrate import experts
from eora_lab.layer.linear import compensated
from eora_lab.text.sources.pydoc import texts
from tests.tiny import compress

pytestmark = pytest.mark.real

STEPS, STARVED = 150, (6, 7)


def windows(split: str, n: int, seed: int) -> torch.Tensor:
    """(n, 128) bytes of Python's help topics."""
    data = torch.tensor(list("\n\n".join(texts(split)).encode()))
    starts = torch.randint(0, len(data) - 128, (n,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[start : start + 128] for start in starts])


@pytest.fixture(autouse=True)
def one_thread():
    """Training and what follows come out otherwise with more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trained():
    """State of a byte-level DeepSeek of three blocks, after a minute of training or less."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config())
    for block in model.model.layers[1:]:
        torch.nn.init.normal_(block.mlp.gate.weight, 0, 0.1)
        block.mlp.gate.e_score_correction_bias[list(STARVED)] = -0.2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        batch = windows("calibration", 16, step)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 2.6 < 5 < losses[0]  # nats a byte
    return model.state_dict()


def config() -> transformers.DeepseekV3Config:
    return transformers.DeepseekV3Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, n_shared_experts=1, q_lora_rank=32, kv_lora_rank=32,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, routed_scaling_factor=1.0, pad_token_id=0,
    )  # fmt: skip


def fresh(state: dict) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_config(config()).eval().requires_grad_(False)
    model.load_state_dict(state)
    return model


SETTINGS = {"group_size": 32, "bits": 2, "rank": 8, "inputs": "original", "progress": False}


@pytest.mark.parametrize("samples", [6, 16])
def test_on_held_out_tokens_shrunk_statistics_beat_routed_ones_and_the_layer_s(samples, trained, monkeypatch):
    """EoRA on the same W^ (round to nearest), judged by the tokens of another text that reach each expert."""
    calibration = windows("calibration", samples, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(experts, "STRENGTHS", (0.0,))
        true = collect_statistics(fresh(trained), windows("heldout", 64, 1), progress=False)
    lost: dict[str, list[float]] = {}
    for kind, changes in {"shrunk": {}, "routed": {"STRENGTHS": (0.0,)}, "layer": {"BOUND": 0}}.items():
        model, original = fresh(trained), fresh(trained)
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(experts, name, value)
            report = compress(model, calibration, **SETTINGS)
        tokens = {layer.name: layer.tokens for layer in report.layers}
        if kind == "shrunk":
            few = [tokens[f"model.layers.{n}.mlp.experts.{e}.down_proj"] for n in (1, 2) for e in STARVED]
            assert max(few) < calibration.numel() / 8  # half of what each would get
        errors = {}
        for name, layer in compensated(model).items():
            if ".experts." in name:
                weight = original_weight(original, name)
                left = weight - layer.dense() - layer.lora_B @ layer.lora_A
                errors[name] = output_energy(left, true[name].second_moment) * true[name].tokens
        starved = sum(error for name, error in errors.items() if name.split(".experts.")[1][0] in "67")
        lost[kind] = [sum(errors.values()), starved]
    print({kind: [round(value, 2) for value in values] for kind, values in lost.items()})
    for of in (0, 1):  # all experts, and the starved
        # with many tokens what serves those left out best may be no shrinkage at all, which depends on the processor
        assert lost["shrunk"][of] < lost["routed"][of] or (samples > 6 and lost["shrunk"] == lost["routed"])
        assert lost["shrunk"][of] < lost["layer"][of]


def original_weight(model: torch.nn.Module, name: str) -> torch.Tensor:
    """The weight of an expert's linear in a model that still fuses them."""
    prefix, index, leaf = name.rsplit(".", 2)
    return model.get_parameter(f"{prefix}.{leaf}")[int(index)]
