"""What multiplies without being an `nn.Linear` becomes one; files keep the layout of the model."""

from torch import nn

from eora_lab.model.conv1d import unfold_conv1d
from eora_lab.model.expert_kinds import unfold_experts


def unfold(model: nn.Module) -> None:
    """GPT-2's Conv1D and fused experts, in place: outputs and `state_dict()` stay the same. Twice does no harm."""
    unfold_conv1d(model)
    unfold_experts(model)
