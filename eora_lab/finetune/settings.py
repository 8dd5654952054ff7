"""Settings of a fine-tuning."""

from typing import Literal

from eora_lab.errors import EoraLabError, settings

Init = Literal["eora", "svd", "lora"]


@settings
class Training:
    """How to train."""

    steps: int = 200
    """optimizer steps"""
    batch_size: int = 4
    """sequences a step"""
    lr: float = 1e-4
    """highest learning rate; 5 % of the steps to reach it, a cosine down to zero"""
    save_every: int = 25
    """steps between two checkpoints, and between two measurements of the held-out loss"""

    def check(self) -> None:
        """Raise EoraLabError when a setting is out of range."""
        if min(self.steps, self.batch_size, self.save_every) < 1 or not 0 < self.lr < float("inf"):
            raise EoraLabError("steps, batch size and save-every must be at least 1, and the learning rate above 0")
