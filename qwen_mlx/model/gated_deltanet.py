"""Linear attention by the gated delta rule (Yang et al. 2024, arXiv 2412.06464; `Qwen3_5GatedDeltaNet`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from qwen_mlx.cache.recurrent import RecurrentCache
from qwen_mlx.config import TextConfig
from qwen_mlx.kernels.activations import sigmoid, softplus
from qwen_mlx.kernels.causal_conv1d import causal_conv1d
from qwen_mlx.kernels.gated_delta import SCAN_TOKENS, gated_delta_rule
from qwen_mlx.kernels.gated_delta_replay import gated_delta_replay
from qwen_mlx.kernels.gated_delta_scan import Tape, gated_delta_scan
from qwen_mlx.kernels.gated_delta_step import StepWeights, gated_delta_step, step_is_fused
from qwen_mlx.model.linear import Linear
from qwen_mlx.model.norm import GatedRMSNorm
from qwen_mlx.model.projection import JointProjection


class Convolution(nn.Module):
    """The taps of the depthwise convolution, [Cn, K]."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = mx.zeros((channels, taps))


@dataclass(frozen=True)
class LayerTape:
    """The states before a short update, conv_state [B, K-1, Cn] and state [B, Hv, Dv, Dk], and what it did to them:
    columns [B, T, Cn], which entered the window of the convolution, and the tape of the delta rule."""

    conv_state: mx.array
    state: mx.array
    columns: mx.array
    delta_rule: Tape

    @property
    def arrays(self) -> list[mx.array]:
        rule = self.delta_rule
        return [self.conv_state, self.state, self.columns, rule.k, rule.g, rule.delta]

    def states_after(self, n: int) -> tuple[mx.array, mx.array]:
        """Both states as they were after the first n of the T tokens, n at least 1."""
        window = _window_after(self.conv_state, self.columns, n)
        return window, gated_delta_replay(self.state, self.delta_rule, n)


def _window_after(conv_state: mx.array, columns: mx.array, n: int) -> mx.array:
    """conv_state [B, K-1, Cn] after the first n, at least 1, of columns [B, T, Cn]."""
    new = columns[:, max(n - conv_state.shape[1], 0) : n]
    return mx.concatenate([conv_state[:, n:].astype(new.dtype), new], axis=1)


class GatedDeltaNet(nn.Module):
    """S_t = alpha S_{t-1} + beta (v - alpha S_{t-1} k) k^T, o = S_t q; gates and state in float32."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_key_heads, self.num_value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        keys, values = self.num_key_heads * self.key_dim, self.num_value_heads * self.value_dim
        self.in_proj_qkv = Linear(D, 2 * keys + values)
        self.in_proj_z = Linear(D, values)
        self.in_proj_b = Linear(D, self.num_value_heads)
        self.in_proj_a = Linear(D, self.num_value_heads)
        self.conv1d = Convolution(2 * keys + values, config.linear_conv_kernel_dim)
        self.A_log = mx.zeros((self.num_value_heads,), mx.float32)
        self.dt_bias = mx.zeros((self.num_value_heads,), mx.float32)
        self.norm = GatedRMSNorm(self.value_dim, config.rms_norm_eps)
        self.out_proj = Linear(values, D)
        self._qkv_and_z = JointProjection("in_proj_qkv", "in_proj_z")
        self._a_and_b = JointProjection("in_proj_a", "in_proj_b")

    def __call__(
        self, x: mx.array, cache: RecurrentCache, tokens: mx.array | None, cuts: Sequence[int] = ()
    ) -> mx.array:
        """x [B, T, D] -> [B, T, D]; `tokens` bool [B, T], False on left padding; after `cuts` the cache gets the states
        too."""
        B, T, _ = x.shape
        conv_state, state = before = self._states(cache, B, x.dtype)
        tape, passed = None, []
        if T == 1 and tokens is None and step_is_fused(conv_state, state):
            (qkv, z), (_, z_start) = self._qkv_and_z.as_they_lie(self, x)
            (a, b), (_, b_start) = self._a_and_b.as_they_lie(self, x)
            weights = StepWeights(self.conv1d.weight, self.A_log, self.dt_bias, self.norm.weight, self.norm.eps)
            y, conv_state, state = gated_delta_step((qkv, z, a, b), weights, conv_state, state, (z_start, b_start))
        else:
            qkv, z = self._qkv_and_z(self, x)
            # Padding is zeroed before the convolution: k = v = 0 leaves an empty state empty.
            q, k, v, conv_state = causal_conv1d(
                qkv,
                self.conv1d.weight,
                conv_state,
                key_heads=self.num_key_heads,
                key_dim=self.key_dim,
                mask=tokens,
            )
            heads = (B, T, self.num_value_heads, self.value_dim)
            columns = qkv if tokens is None else mx.where(tokens[..., None], qkv, 0)
            rule = (q, k, v.reshape(heads), *self._gates(x))
            if 1 < T <= SCAN_TOKENS and not cuts:
                o, state, delta_rule = gated_delta_scan(*rule, state)
                tape = LayerTape(*before, columns, delta_rule)
            else:
                o, state, states = _in_pieces(rule, state, cuts)
                passed = [(_window_after(before[0], columns, n), s) for n, s in zip(cuts, states)]
                if passed:  # made at once: waiting, they would keep the columns of every layer
                    (o,) = mx.depends([o], [window for window, _ in passed])
            y = self.norm(o, z.reshape(heads)).reshape(B, T, -1)
        cache.update(conv_state, state, T, tape, passed)
        return self.out_proj(y)

    def _gates(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Log decay g = -exp(A_log) softplus(a + dt_bias), and beta = sigmoid(b): [B, T, Hv] float32."""
        a = self.in_proj_a(x).astype(mx.float32) + self.dt_bias
        return -mx.exp(self.A_log) * softplus(a), sigmoid(self.in_proj_b(x))

    def _states(self, cache: RecurrentCache, batch: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        if cache.conv_state is not None and cache.recurrent_state is not None:
            return cache.conv_state, cache.recurrent_state
        channels, taps = self.conv1d.weight.shape
        return (
            mx.zeros((batch, taps - 1, channels), dtype),
            mx.zeros((batch, self.num_value_heads, self.value_dim, self.key_dim), mx.float32),
        )


def _in_pieces(
    rule: tuple[mx.array, mx.array, mx.array, mx.array, mx.array], state: mx.array, cuts: Sequence[int]
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """The delta rule over all T tokens: o [B, T, Hv, Dv], the state behind them, and those after `cuts`."""
    if not cuts:
        o, state = gated_delta_rule(*rule, state)
        return o, state, []
    outputs, states, start = [], [], 0
    for end in (*cuts, rule[0].shape[1]):
        q, k, v, g, beta = (y[:, start:end] for y in rule)
        o, state = gated_delta_rule(q, k, v, g, beta, state)
        outputs.append(o)
        states.append(state)
        start = end
    return mx.concatenate(outputs, axis=1), state, states[:-1]
