"""Random layers and input statistics, for tests of one weight at a time."""

import torch

from eora_lab import InputStatistics
from eora_lab.compress import Compressed


def statistics_of(features: int, tokens: int = 400, seed: int = 0) -> InputStatistics:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator)
    statistics = InputStatistics(features)
    statistics.update(torch.randn(tokens, features, generator=generator) @ mix)
    return statistics


def weight_of(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def output_error(weight: torch.Tensor, compressed: Compressed, statistics: InputStatistics) -> float:
    R = (weight - compressed.dense()).double()
    return (R @ statistics.second_moment.double() * R).sum().item()
