"""Qwen3.5 on Apple Silicon with MLX.

from qwen_mlx import load, generate
model, tokenizer = load("demo")
print(generate(model, tokenizer, "Once upon a time"))
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_mlx.batch import BatchAnswer, batch_generate
    from qwen_mlx.cache.prefix import PrefixStore
    from qwen_mlx.conversation import Chat
    from qwen_mlx.decoding.prompt_file import load_prompt_cache, save_prompt_cache
    from qwen_mlx.decoding.reuse import PromptCache
    from qwen_mlx.decoding.sampling import SamplingParams
    from qwen_mlx.generate import GenerationResponse, generate, stream_generate
    from qwen_mlx.load import load

__version__ = "0.1.0"
__all__ = [
    "BatchAnswer",
    "Chat",
    "GenerationResponse",
    "PrefixStore",
    "PromptCache",
    "SamplingParams",
    "__version__",
    "batch_generate",
    "generate",
    "load",
    "load_prompt_cache",
    "save_prompt_cache",
    "stream_generate",
]

_HOMES = {
    "BatchAnswer": "qwen_mlx.batch",
    "batch_generate": "qwen_mlx.batch",
    "Chat": "qwen_mlx.conversation",
    "GenerationResponse": "qwen_mlx.generate",
    "PrefixStore": "qwen_mlx.cache.prefix",
    "PromptCache": "qwen_mlx.decoding.reuse",
    "SamplingParams": "qwen_mlx.decoding.sampling",
    "generate": "qwen_mlx.generate",
    "load": "qwen_mlx.load",
    "load_prompt_cache": "qwen_mlx.decoding.prompt_file",
    "save_prompt_cache": "qwen_mlx.decoding.prompt_file",
    "stream_generate": "qwen_mlx.generate",
}


class _Package(ModuleType):
    """`generate` and `load` are modules too, for `python -m`; as attributes of the package they are the functions."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    # Late, so that `import qwen_mlx` costs nothing.
    if name not in _HOMES:
        raise AttributeError(f"module 'qwen_mlx' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
