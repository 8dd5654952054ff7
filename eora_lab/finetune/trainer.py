"""The training itself: the real peft and the transformers Trainer around packed weights."""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from eora_lab.errors import EoraLabError, one_line
from eora_lab.finetune.checkpoints import written
from eora_lab.finetune.settings import Training
from eora_lab.formats.names import Factors
from eora_lab.layer.linear import CompensatedLinear
from eora_lab.products import fast_products
from eora_lab.run.adapters import Adapters, compensated_layers


class FrozenLinear(nn.Linear):
    """A compensated layer in the shape that peft can wrap: an nn.Linear, whose product is that of the packed W^.

    Its weight is empty: peft only asks it for a device and a dtype.
    """

    def __init__(self, layer: CompensatedLinear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.layer = layer
        self.register_parameter("bias", None)
        self.register_buffer("weight", layer.lora_A.new_empty(0), persistent=False)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return self.layer(x)


class Bar(transformers.TrainerCallback):
    """A progress bar with the last training loss."""

    def on_train_begin(self, args, state, control, **kwargs):
        from eora_lab.progress import tqdm

        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", leave=False)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.bar.set_postfix({key: f"{logs[key]:.4f}" for key in ("loss", "eval_loss") if key in logs})

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


@fast_products()
def train(
    model: nn.Module,
    start: Factors | None,
    rank: int,
    tokens: Int[Tensor, "nsamples seqlen"],
    held_out: Int[Tensor, "windows seqlen_held_out"],
    folder: Path,
    training: Training,
    seed: int,
    checkpoint: Path | None,
) -> tuple[Factors, list[dict]]:
    """Train from `start` (None: LoRA's own), or go on from a checkpoint. Returns the factors and the log.

    Only A and B get gradients: W^ is packed, and everything else is frozen.
    """
    layers = compensated_layers(model)
    Adapters(model).use(None)  # peft adds the path itself
    transformers.set_seed(seed)  # LoRA's A is random
    for name, layer in layers.items():
        model.set_submodule(name, FrozenLinear(layer))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers), task_type="CAUSAL_LM")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's, of a name that transformers retires
            try:
                wrapped = peft.get_peft_model(model, config)
            except ValueError as error:  # such as out_proj of a Mamba
                raise EoraLabError(f"peft cannot train this model: {one_line(error)}") from error
        config.base_model_name_or_path = None  # else peft looks for it on the hub at each save
        halves: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
        for name, (A, B) in (start or {}).items():
            halves[name].lora_A["default"].weight.data.copy_(A)
            halves[name].lora_B["default"].weight.data.copy_(B)
        trainer = transformers.Trainer(
            wrapped,
            _arguments(folder, training, seed, wrapped.device, first=checkpoint is None),
            train_dataset=_examples(tokens),
            eval_dataset=_examples(held_out),
            callbacks=[Bar()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        with written(folder):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        log = [
            {key: entry[key] for key in ("step", "loss", "eval_loss", "learning_rate") if key in entry}
            for entry in trainer.state.log_history
            if "loss" in entry or "eval_loss" in entry
        ]
        if not all(torch.tensor([e.get("loss", e.get("eval_loss")) for e in log]).isfinite()):
            raise EoraLabError("the loss is no longer finite: train with a lower learning rate")
        factors = {
            name: (m.lora_A["default"].weight.data.clone(), m.lora_B["default"].weight.data.clone())
            for name, m in halves.items()
        }
        wrapped.unload()
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        model.__dict__.pop("peft_config", None)  # which peft leaves where a training ends with an error
        model.eval()
    return factors, log


def _arguments(folder: Path, training: Training, seed: int, device: torch.device, first: bool):
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        learning_rate=training.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, training.steps // 20),
        weight_decay=0.0,
        logging_steps=max(1, training.steps // 40),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=training.save_every,
        eval_on_start=first,
        save_steps=training.save_every,
        save_total_limit=2,
        seed=seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        log_level="error",
        report_to="none",
    )


def _examples(tokens: Int[Tensor, "n seqlen"]) -> list[dict[str, Tensor]]:
    return [{"input_ids": sequence, "labels": sequence} for sequence in tokens.cpu()]
