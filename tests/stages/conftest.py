"""The fixtures of tests that derive the weights of whole runs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.config.stages import OptimizerConfig
from dovetail.model import placement
from dovetail.stages import supervised
from dovetail.training.weights import trained_weights


@pytest.fixture
def first_weights(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What the trained weights are when the optimiser is made; the run computes in float64."""
    seen: dict[str, Tensor] = {}
    honest = supervised.optimizer_for

    def optimizer_for(model: Any, settings: OptimizerConfig) -> Any:
        seen.update({name: weight.clone() for name, weight in trained_weights(model).items()})
        return honest(model, settings)

    monkeypatch.setattr(supervised, "optimizer_for", optimizer_for)
    monkeypatch.setitem(placement._DTYPES, "fp32", torch.float64)
    return seen
