"""Whether a prompt fits into memory, said before its first token is read: bytes counted from the configuration alone.

The figures of a chunk are those of plain MLX on a CPU, where they were held against the peaks of tiny models (within
20 %). On Metal the kernels need less, and scores are not written out where MLX has fused attention: there it is a
prediction that nobody has measured.
"""

from dataclasses import dataclass, replace

import mlx.core as mx

from qwen_mlx.cache.prefix import PrefixStore
from qwen_mlx.cache.quantized_kv import GROUPS
from qwen_mlx.cache.sequence import CHECKPOINTS
from qwen_mlx.cache.sizes import kv_bytes_per_token, slab_tokens, state_bytes
from qwen_mlx.config import FULL, TextConfig
from qwen_mlx.decoding.memory import memory_limit
from qwen_mlx.errors import MemoryLimitError
from qwen_mlx.kernels.backend import gpu_generation
from qwen_mlx.load import parameters
from qwen_mlx.model.mtp import MTPHead
from qwen_mlx.model.qwen import Qwen

STEP_SIZES = (512, 256, 128, 64)
"""Tokens of a chunk, by preference: more are no faster and take more memory."""
FUSED_HEADS = (64, 80, 128, 256)
"""Head sizes that MLX's attention for Metal takes without writing out the scores of a chunk."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak of a prompt and its answer, `tokens` in all."""

    tokens: int
    step_size: int
    kv_bits: int | None
    weights: int
    keys_values: int
    states: int  # and those before the last update, by which the cache goes back
    others: int  # what else MLX holds now: snapshots, other models
    snapshots: int  # most that will be kept of this text for others
    prefill: int  # what one chunk takes while it is computed

    @property
    def total(self) -> int:
        return self.weights + self.keys_values + self.states + self.others + self.snapshots + self.prefill


@dataclass(frozen=True)
class Request:
    """What a plan is made for: a model's configuration, the bytes of its weights, the dtype of its activations."""

    config: TextConfig
    weights: int
    dtype: mx.Dtype
    kv_bits: int | None = None
    others: int = 0
    store_room: int = 0  # bytes that a prefix store still takes
    places: int = 0  # of the text at which it gets the states
    heads: int = 0  # draft heads, each with one full-attention layer more
    rows: int = 1  # such texts at once; their prompts are read one after the other

    def plan(self, prompt: int, new: int, step_size: int) -> MemoryPlan:
        """For `prompt` tokens and `new` ones behind them. Errors of `kv_bits` as `QuantizedKVCache` has them."""
        config, rest = self.config, prompt % step_size
        full = config.layer_types.count(FULL)
        slabs = self.rows * slab_tokens(prompt, new, step_size) * kv_bytes_per_token(config, self.dtype, self.kv_bits)
        heads = self.heads * slab_tokens(prompt, new, step_size) * kv_bytes_per_token(config, self.dtype) // full
        # A slab that grows is there twice for a moment, in one layer after the other.
        growing = slabs // full if prompt + new > step_size else 0
        # The last whole chunk, or what is left behind it and sees more keys.
        chunks = (min(step_size, prompt - rest), prompt - rest), (rest, prompt)
        return MemoryPlan(
            tokens=prompt + new,
            step_size=step_size,
            kv_bits=self.kv_bits,
            weights=self.weights,
            keys_values=slabs + heads,
            states=2 * self.rows * state_bytes(config, self.dtype),
            others=self.others,
            snapshots=self._kept(prompt + new),
            prefill=growing + max(count * self._bytes_per_chunk_token(keys) for count, keys in chunks),
        )

    def _kept(self, tokens: int) -> int:
        """Of a text by itself, in a store: keys and values once more, and states at its places. Of those that the store
        has no room for, the text's own cache still has the last few."""
        states = state_bytes(self.config, self.dtype)
        stored = tokens * kv_bytes_per_token(self.config, self.dtype, self.kv_bits) + self.places * states
        return max(min(self.store_room, stored), min(self.places, CHECKPOINTS) * states)

    def _bytes_per_chunk_token(self, keys: int) -> int:
        """At the widest layer, with `keys` tokens in sight. The factors count arrays held at once, as measured."""
        c, size = self.config, self.dtype.size
        scores = keys * (c.num_attention_heads * size + 1) if self._scores_are_written() else 0
        attention = (8 * c.num_attention_heads + 6 * c.num_key_value_heads) * c.head_dim * size + scores
        keys_wide = 2 * c.linear_num_key_heads * c.linear_key_head_dim
        values_wide = c.linear_num_value_heads * c.linear_value_head_dim
        delta = 7 * (keys_wide + 2 * values_wide) * mx.float32.size
        if c.moe:
            expert = 3 * (c.moe.moe_intermediate_size + c.hidden_size)
            mlp = c.moe.num_experts_per_tok * expert + 3 * c.moe.shared_expert_intermediate_size
        else:
            mlp = 3 * c.intermediate_size
        return max(attention, delta) + (mlp + 6 * c.hidden_size) * size

    def _scores_are_written(self) -> bool:
        return gpu_generation() is None or self.kv_bits is not None or self.config.head_dim not in FUSED_HEADS


def check_memory(
    model: Qwen,
    prompt: int,
    new: int,
    *,
    step_size: int | None = None,
    kv_bits: int | None = None,
    force: bool = False,
    held: int = 0,
    store: PrefixStore | None = None,
    places: int = 0,
    head: MTPHead | None = None,
    rows: int = 1,
) -> MemoryPlan:
    """The plan for `prompt` tokens and `new` ones; without `step_size`, with the preferred chunk that fits.

    `held`: bytes that the text's cache has now, which count as what they will be. A `store`, which gets the states at
    so many `places` of the text, gives up what it kept where that makes room enough. A draft `head` has weights, keys
    and values of its own.

    Raises MemoryLimitError where it exceeds what the device allows, unless `force`; ValueError for a `step_size` below
    1; errors of `kv_bits` as `QuantizedKVCache` has them.
    """
    if step_size is not None and step_size < 1:
        raise ValueError(f"The prefill step_size must be at least 1 token, not {step_size!r}.")
    weights = sum(array.nbytes for array in parameters(model).values())
    if head is not None:
        weights += sum(array.nbytes for array in parameters(head).values())
    limit, config = memory_limit(), model.config.text

    def planned(*, kept: int, room: int) -> tuple[Request, MemoryPlan]:
        others = max(0, mx.get_active_memory() - weights - held - kept)  # weights may not have been read yet
        request = Request(config, weights, model.dtype, kv_bits, others, room, places, int(head is not None), rows)
        return request, choose_plan(request, prompt, new, limit, step_size)

    request, plan = planned(kept=store.nbytes if store else 0, room=0)  # with all of it given up
    if limit is not None and plan.total > limit:
        if not force:
            raise MemoryLimitError(_refusal(request, plan, limit))
        return plan
    while store:
        _, plan = planned(kept=0, room=max(0, store.max_bytes - store.nbytes))
        if limit is None or plan.total <= limit or not store.drop():
            break
    return plan


def choose_plan(request: Request, prompt: int, new: int, limit: int | None, step_size: int | None = None) -> MemoryPlan:
    """With `step_size`, else with the preferred chunk that fits into `limit` bytes, the smallest where none does."""
    plans = (request.plan(prompt, new, size) for size in ([step_size] if step_size else STEP_SIZES))
    plan = next(plans)
    while limit is not None and plan.total > limit and (smaller := next(plans, None)):
        plan = smaller
    return plan


def longest_context(request: Request, limit: int) -> int:
    """Tokens of the longest prompt that fits into `limit` bytes in chunks of any size; 0 where none does."""
    length, step = 0, 1 << 24
    while step:
        if choose_plan(request, length + step, 0, limit).total <= limit:
            length += step
        step //= 2
    return length


def _refusal(request: Request, plan: MemoryPlan, limit: int) -> str:
    parts = {
        "weights": plan.weights,
        "keys and values": plan.keys_values,
        "states": plan.states,
        "what is held already": plan.others,
        "what is kept for the next prompt": plan.snapshots,
        f"a chunk of {plan.step_size} tokens": plan.prefill,
    }
    numbers = ", ".join(f"{what} {_gigabytes(size)}" for what, size in parts.items() if size >= 5e6)
    fitting = longest_context(request, limit)
    remedies = [f"{fitting:,} tokens would fit"] if fitting else []
    if request.rows > 1:
        return (
            f"{request.rows} texts of {plan.tokens:,} tokens take {_gigabytes(plan.total)} GB ({numbers}), and this "
            f"device allows {_gigabytes(limit)} GB: {', '.join(['take a smaller batch_size', *remedies])}; force=True "
            "tries it all the same."
        )
    for bits in (8, 4):
        if bits < (request.kv_bits or 16) and request.config.head_dim % GROUPS[-1] == 0:
            more = longest_context(replace(request, kv_bits=bits), limit)
            remedies += [f"{more:,} with --kv-bits {bits}"] if more > fitting else []
    return (
        f"A text of {plan.tokens:,} tokens takes {_gigabytes(plan.total)} GB ({numbers}), and this device allows "
        f"{_gigabytes(limit)} GB: {', '.join(remedies) or 'not even its first tokens fit, take a smaller model'}; "
        "--force tries it all the same."
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}"
