"""The mistakes known from other implementations. Each function makes one, in a model of its own or in the code it runs.

In: a float32 model to spoil, a `MonkeyPatch` for the code. What the mistake does to the numbers is not known here.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from qwen_mlx.cache.recurrent import RecurrentCache
from qwen_mlx.kernels.activations import sigmoid, silu, silu_gated
from qwen_mlx.kernels.causal_conv1d import causal_conv1d
from qwen_mlx.kernels.gated_delta import gated_delta_rule
from qwen_mlx.model import attention, gated_deltanet, moe, qwen
from qwen_mlx.model.decoder import DecoderLayer
from qwen_mlx.model.gated_deltanet import GatedDeltaNet
from qwen_mlx.model.moe import SparseMoeBlock
from qwen_mlx.model.norm import GatedRMSNorm, RMSNorm
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.model.rope import RotaryEmbedding
from qwen_mlx.model.span import Span, make_span

Patch = pytest.MonkeyPatch


def rewrite(model: Qwen, endings: str | tuple[str, ...], change: Callable[[mx.array], mx.array]) -> None:
    """Change every weight whose name ends so."""
    changed = [(n, change(a)) for n, a in tree_flatten(model.parameters()) if n.endswith(endings)]
    assert changed
    model.load_weights(changed, strict=False)


def modules(model: Qwen, kind: type[nn.Module]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def to_bfloat16(x: mx.array) -> mx.array:
    return x.astype(mx.bfloat16).astype(mx.float32)


def replace_rule(patch: Patch, rule: Callable[..., tuple[mx.array, mx.array]]) -> None:
    patch.setattr(gated_deltanet, "gated_delta_rule", rule)


def replace_gates(patch: Patch, step: Callable[[mx.array, mx.array], mx.array]) -> None:
    """`step(a, dt_bias)` in place of softplus(a + dt_bias)."""

    def gates(self: GatedDeltaNet, x: mx.array) -> tuple[mx.array, mx.array]:
        return -mx.exp(self.A_log) * step(self.in_proj_a(x), self.dt_bias), sigmoid(self.in_proj_b(x))

    patch.setattr(GatedDeltaNet, "_gates", gates)


def replace_gated_norm(patch: Patch, norm: Callable[[GatedRMSNorm, mx.array, mx.array], mx.array]) -> None:
    patch.setattr(GatedRMSNorm, "__call__", norm)


def gate_before_the_norm(model: Qwen, patch: Patch) -> None:
    replace_gated_norm(patch, lambda self, x, gate: mx.fast.rms_norm(x * silu(gate), self.weight, self.eps))


def gated_norm_is_zero_centred(model: Qwen, patch: Patch) -> None:
    rewrite(model, "linear_attn.norm.weight", lambda w: 1 + w)


def sigmoid_for_silu(model: Qwen, patch: Patch) -> None:
    replace_gated_norm(patch, lambda self, x, gate: mx.fast.rms_norm(x, self.weight, self.eps) * sigmoid(gate))


def key_heads_tiled(model: Qwen, patch: Patch) -> None:
    def rule(q: mx.array, k: mx.array, v: mx.array, *rest: mx.array) -> tuple[mx.array, mx.array]:
        group = v.shape[2] // q.shape[2]
        return gated_delta_rule(mx.tile(q, (1, 1, group, 1)), mx.tile(k, (1, 1, group, 1)), v, *rest)

    replace_rule(patch, rule)


def taps_reversed(model: Qwen, patch: Patch) -> None:
    rewrite(model, "conv1d.weight", lambda w: w[:, ::-1])


def a_and_b_exchanged(model: Qwen, patch: Patch) -> None:
    for layer in modules(model, GatedDeltaNet):
        layer.in_proj_a, layer.in_proj_b = layer.in_proj_b, layer.in_proj_a


def bias_behind_softplus(model: Qwen, patch: Patch) -> None:
    replace_gates(patch, lambda a, dt_bias: nn.softplus(a) + dt_bias)


def decay_after_the_update(model: Qwen, patch: Patch) -> None:
    def rule(q: mx.array, k: mx.array, v: mx.array, g: mx.array, *rest: mx.array) -> tuple[mx.array, mx.array]:
        return gated_delta_rule(q, k, v, mx.concatenate([mx.zeros_like(g[:, :1]), g[:, :-1]], axis=1), *rest)

    replace_rule(patch, rule)


def queries_not_scaled(model: Qwen, patch: Patch) -> None:
    replace_rule(patch, lambda q, *rest: gated_delta_rule(q * q.shape[-1] ** 0.5, *rest))


def rms_eps_of_1e_5(model: Qwen, patch: Patch) -> None:
    for norm in modules(model, RMSNorm) + modules(model, GatedRMSNorm):
        norm.eps = 1e-5


def q_proj_split_in_halves(model: Qwen, patch: Patch) -> None:
    for layer in modules(model, attention.Attention):
        two_halves = layer.q_proj.weight.reshape(2, layer.num_heads, layer.head_dim, -1)
        layer.q_proj.weight = two_halves.swapaxes(0, 1).reshape(layer.q_proj.weight.shape)


def rotary_pairs_adjacent(model: Qwen, patch: Patch) -> None:
    def rope(self: RotaryEmbedding, x: mx.array, offset: int, positions: mx.array | None = None) -> mx.array:
        return mx.fast.rope(x, self.dims, traditional=True, base=self.base, scale=1.0, offset=offset)

    patch.setattr(RotaryEmbedding, "__call__", rope)


def state_in_bfloat16(model: Qwen, patch: Patch) -> None:
    def rule(*args: mx.array) -> tuple[mx.array, mx.array]:
        *inputs, state = args
        outputs = []
        for t in range(inputs[0].shape[1]):
            o, state = gated_delta_rule(*(x[:, t : t + 1] for x in inputs), state)
            state = to_bfloat16(state)
            outputs.append(o)
        return mx.concatenate(outputs, axis=1), state

    replace_rule(patch, rule)


def gains_in_bfloat16(model: Qwen, patch: Patch) -> None:
    rewrite(model, ("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight"), to_bfloat16)


def softplus_in_bfloat16(model: Qwen, patch: Patch) -> None:
    def step(a: mx.array, dt_bias: mx.array) -> mx.array:
        return nn.softplus((a + dt_bias).astype(mx.bfloat16)).astype(mx.float32)

    replace_gates(patch, step)


def queries_and_keys_in_bfloat16(model: Qwen, patch: Patch) -> None:
    replace_rule(patch, lambda q, k, *rest: gated_delta_rule(to_bfloat16(q), to_bfloat16(k), *rest))


def a_log_in_bfloat16(model: Qwen, patch: Patch) -> None:
    rewrite(model, "A_log", to_bfloat16)


def gated_norm_in_bfloat16(model: Qwen, patch: Patch) -> None:
    rewrite(model, "linear_attn.norm.weight", to_bfloat16)


def one_not_added_to_the_gains(model: Qwen, patch: Patch) -> None:
    rewrite(model, ("layernorm.weight", "model.norm.weight"), lambda w: w - 1)


def one_added_twice_to_the_gains(model: Qwen, patch: Patch) -> None:
    rewrite(model, ("layernorm.weight", "model.norm.weight"), lambda w: w + 1)


def head_norms_not_zero_centred(model: Qwen, patch: Patch) -> None:
    rewrite(model, ("q_norm.weight", "k_norm.weight"), lambda w: w - 1)


def embedding_as_head_of_an_untied_model(model: Qwen, patch: Patch) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def theta_of_another_default(model: Qwen, patch: Patch) -> None:
    for layer in modules(model, attention.Attention):
        layer._rope.base = 100_000.0


def silu_for_sigmoid_in_attention(model: Qwen, patch: Patch) -> None:
    patch.setattr(attention, "sigmoid_gated", silu_gated)


def kv_heads_tiled(model: Qwen, patch: Patch) -> None:
    """Four query heads on two: exchanging the middle ones is reading the other key/value head."""
    order = mx.array([0, 2, 1, 3])
    for layer in modules(model, attention.Attention):
        q, o = layer.q_proj.weight, layer.o_proj.weight
        layer.q_proj.weight = q.reshape(4, -1, q.shape[-1])[order].reshape(q.shape)
        layer.o_proj.weight = o.reshape(o.shape[0], 4, -1)[:, order].reshape(o.shape)


def no_mask(model: Qwen, patch: Patch) -> None:
    patch.setattr(qwen, "make_span", lambda *args, **kwargs: replace(make_span(*args, **kwargs), attention=None))


def padding_enters_the_convolution(model: Qwen, patch: Patch) -> None:
    patch.setattr(qwen, "make_span", lambda *args, **kwargs: replace(make_span(*args, **kwargs), tokens=None))


def padding_is_attended_to(model: Qwen, patch: Patch) -> None:
    def span(count: int, offset: int, **kwargs: Any) -> Span:
        unpadded = make_span(count, offset)
        return replace(make_span(count, offset, **kwargs), attention=unpadded.attention)

    patch.setattr(qwen, "make_span", span)


def padding_is_attended_to_from_the_second_token_on(model: Qwen, patch: Patch) -> None:
    def span(count: int, offset: int, **kwargs: Any) -> Span:
        padded = make_span(count, offset, **kwargs)
        return padded if offset == 0 else replace(padded, attention=make_span(count, offset).attention)

    patch.setattr(qwen, "make_span", span)


def window_forgotten(model: Qwen, patch: Patch) -> None:
    def conv(x: mx.array, weight: mx.array, conv_state: mx.array, **kwargs: Any) -> tuple[mx.array, ...]:
        return causal_conv1d(x, weight, mx.zeros_like(conv_state), **kwargs)

    patch.setattr(gated_deltanet, "causal_conv1d", conv)


def window_kept_behind_the_convolution(model: Qwen, patch: Patch) -> None:
    def conv(x: mx.array, weight: mx.array, conv_state: mx.array, **kwargs: Any) -> tuple[mx.array, ...]:
        q, k, v, _ = causal_conv1d(x, weight, conv_state, **kwargs)
        mixed = mx.concatenate([y.reshape(*x.shape[:2], -1) for y in (q, k, v)], axis=-1)
        return q, k, v, mx.concatenate([conv_state, mixed], axis=1)[:, x.shape[1] :]

    patch.setattr(gated_deltanet, "causal_conv1d", conv)


def state_forgotten(model: Qwen, patch: Patch) -> None:
    replace_rule(patch, lambda *args: gated_delta_rule(*args[:-1], mx.zeros_like(args[-1])))


def state_not_stored(model: Qwen, patch: Patch) -> None:
    call = GatedDeltaNet.__call__

    def stale(self: GatedDeltaNet, x: mx.array, cache: RecurrentCache, *rest: Any) -> mx.array:
        before = cache.snapshot()
        out = call(self, x, cache, *rest)
        if before[0] is not None:
            cache.restore(before)
        return out

    patch.setattr(GatedDeltaNet, "__call__", stale)


def positions_start_again(model: Qwen, patch: Patch) -> None:
    call = RotaryEmbedding.__call__
    patch.setattr(RotaryEmbedding, "__call__", lambda self, x, offset, positions=None: call(self, x, 0, positions))


def second_norm_before_the_mixer_is_added(model: Qwen, patch: Patch) -> None:
    def layer(
        self: DecoderLayer, x: mx.array, update: mx.array | None, cache: Any, span: Span
    ) -> tuple[mx.array, mx.array]:
        x, normed = self.input_layernorm.of_sum(x, update)
        if "self_attn" in self:
            mixed = self.self_attn(normed, cache, span.attention, span.positions)
        else:
            mixed = self.linear_attn(normed, cache, span.tokens)
        return x + mixed, self.mlp(self.post_attention_layernorm(x))

    patch.setattr(DecoderLayer, "__call__", layer)


def experts_not_renormalised(model: Qwen, patch: Patch) -> None:
    def block(self: SparseMoeBlock, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        scores = mx.softmax(self.gate(rows), axis=-1)
        chosen = mx.argpartition(-scores, self.top_k - 1, axis=-1)[:, : self.top_k]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        routed = (self.switch_mlp(rows, chosen) * weights[..., None]).sum(axis=1)
        return (routed + sigmoid(self.shared_expert_gate(rows)) * self.shared_expert(rows)).reshape(x.shape)

    patch.setattr(SparseMoeBlock, "__call__", block)


def gate_and_up_of_experts_exchanged(model: Qwen, patch: Patch) -> None:
    for block in modules(model, SparseMoeBlock):
        experts = block.switch_mlp
        experts.gate_proj, experts.up_proj = experts.up_proj, experts.gate_proj


def shared_expert_not_gated(model: Qwen, patch: Patch) -> None:
    patch.setattr(moe, "sigmoid", lambda x: mx.ones_like(x))


def one_expert_less(model: Qwen, patch: Patch) -> None:
    for block in modules(model, SparseMoeBlock):
        block.top_k -= 1
