"""mlx-lm as the model bench measures it: its own loader, its own `generate_step` with its own defaults, greedily.

Importing this module costs nothing; mlx-lm is imported when it is loaded.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_map_with_path

from qwen_mlx.bench.model_engines import parameter_bytes
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.load import parameters
from qwen_mlx.model.qwen import Qwen


class NoPeer(QwenMLXError):
    """mlx-lm is not here, or cannot load the model; the sentence says which."""


class MlxLM:
    """`exact_gains`: its norms have the very gains that ours have, so that only the order of sums differs."""

    name = "mlx-lm"

    def __init__(self, folder: Path, ours: Qwen) -> None:
        """The model of `folder`, in the dtype of `ours`; nothing is evaluated yet. Raises NoPeer."""
        self.model = load_peer(folder)
        _, self._generate_step, self._wired_limit, self._stream = _import()
        _cast(self.model, ours.dtype)
        self.exact_gains = _gains_agree(self.model, ours)
        self.weight_bytes = parameter_bytes(self.model)

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        return (int(token) for token, _ in self._generate(prompt, count))

    def follow(self, prompt: Sequence[int], tokens: Sequence[int]) -> Iterator[mx.array]:
        """The log-probabilities [V] at the place of each of `tokens` after `prompt`; they go in, whatever it prefers.

        To be exhausted: until then the default stream is mlx-lm's.
        """
        waiting = iter(tokens)

        def forced(_: mx.array) -> mx.array:
            # mlx-lm begins one step more than it was asked for, and no token is left for that one.
            return mx.array([next(waiting, 0)])

        return (row for _, row in self._generate(prompt, len(tokens), sampler=forced))

    def _generate(
        self, prompt: Sequence[int], count: int, sampler: Callable[[mx.array], mx.array] | None = None
    ) -> Iterator[tuple[Any, mx.array]]:
        with self._wired_limit(self.model, [self._stream]):  # as its `stream_generate` has it
            yield from self._generate_step(mx.array(list(prompt)), self.model, max_tokens=count, sampler=sampler)

    def synchronize(self) -> None:
        mx.synchronize(self._stream)


def load_peer(folder: Path) -> Any:
    """mlx-lm's model of `folder`, its weights unread. Raises NoPeer."""
    load_model, *_ = _import()
    try:
        return load_model(folder, lazy=True)[0]
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise NoPeer(f"mlx-lm cannot load {folder}: {reason}.") from None


def _import() -> Any:
    """`load_model`; `generate_step`, what `stream_generate` puts around it, and the stream that it works on."""
    if not TYPE_CHECKING:  # mlx-lm brings no types
        try:
            from mlx_lm.generate import generate_step, generation_stream, wired_limit
            from mlx_lm.utils import load_model
        except ImportError as error:
            raise NoPeer(f"mlx-lm cannot be imported ({error}); run `pip install mlx-lm`.") from None

        return load_model, generate_step, wired_limit, generation_stream


def _cast(model: Any, dtype: mx.Dtype) -> None:
    """Give `model` the dtype of our activations, where the checkpoint has another one, by mlx-lm's own rule."""
    if dtype == mx.float32:
        model.set_dtype(mx.float32)
        return
    floating = {array.dtype for array in parameters(model).values() if mx.issubdtype(array.dtype, mx.floating)}
    if floating <= {dtype, mx.float32} and dtype in floating:
        return

    def cast(path: str, array: mx.array) -> mx.array:
        is_cast = mx.issubdtype(array.dtype, mx.floating) and model.cast_predicate(path)
        return array.astype(dtype) if is_cast else array

    model.update(tree_map_with_path(cast, model.parameters()))


def _gains_agree(model: Any, ours: Qwen) -> bool:
    """mlx-lm adds the one of 1 + w in the dtype of w, and where that is bfloat16 loses digits of w."""
    theirs = {name.removeprefix("language_model."): array for name, array in parameters(model).items()}
    gains = {name: array for name, array in parameters(ours).items() if name.endswith("norm.weight")}
    return gains.keys() <= theirs.keys() and all(
        mx.array_equal(array, theirs[name].astype(mx.float32)).item() for name, array in gains.items()
    )
