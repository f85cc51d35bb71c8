"""What many tests share: the golden checkpoints, each built once, and the models loaded from them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings

from qwen_mlx.load import load_model
from qwen_mlx.model.qwen import Qwen
from tests.golden.checkpoints import build

# How long a machine takes to draw an example says nothing about the example.
settings.register_profile("any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_machine")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """MLX seeds itself with the time; a test that fails should fail again."""
    mx.random.seed(0)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint_of(variant)`: the folder of that golden checkpoint; not to be written to."""

    @cache
    def checkpoint(variant: str) -> Path:
        return build(variant, tmp_path_factory.mktemp(variant))

    return checkpoint


@pytest.fixture(scope="session")
def model_of(checkpoint_of: Callable[[str], Path]) -> Callable[[str, str], Qwen]:
    """`model_of(variant, dtype)`: shared by all tests; one that changes a model loads its own."""

    @cache
    def model(variant: str, dtype: str) -> Qwen:
        return load_model(checkpoint_of(variant), dtype=dtype)

    return model
