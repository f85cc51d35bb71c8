"""Inputs of the kernels: those of a mixer, and those that break a careless form of the delta rule."""

import mlx.core as mx
import numpy as np

from qwen_mlx.kernels.gated_delta_step import StepWeights


def conv_problem(T, *, B=2, values=24, K=4, dtype=mx.float32, key_heads=2, key_dim=32):
    """x, taps, conv_state."""
    rng = np.random.default_rng(T)
    Cn = 2 * key_heads * key_dim + values
    shapes = (B, T, Cn), (Cn, K), (B, K - 1, Cn)
    return [mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype) for shape in shapes]


def step_problem(*, B=2, Hk=2, group=2, Dk=32, Dv=24, K=4, dtype=mx.float32):
    """(projected, weights, conv_state, state) of one layer."""
    rng = np.random.default_rng(0)
    Hv = Hk * group
    Cn = 2 * Hk * Dk + Hv * Dv

    def normal(*shape):
        return mx.array(rng.standard_normal(shape).astype(np.float32))

    projected = tuple(normal(B, 1, n).astype(dtype) for n in (Cn, Hv * Dv, Hv, Hv))
    weights = StepWeights(normal(Cn, K).astype(dtype), normal(Hv), normal(Hv), 1 + 0.2 * normal(Dv), 1e-6)
    return projected, weights, normal(B, K - 1, Cn).astype(dtype), 0.3 * normal(B, Hv, Dv, Dk)


def as_one_matmul_gives_them(projected):
    """The same with z behind qkv and b behind a, and where each of these two begins."""
    qkv, z, a, b = projected
    qkvz, ab = mx.concatenate([qkv, z], axis=-1), mx.concatenate([a, b], axis=-1)
    return (qkvz, qkvz, ab, ab), (qkv.shape[-1], a.shape[-1])


def problem(T, *, B=2, Hk=2, group=2, Dk=32, Dv=64, dtype=mx.float32, seed=0):
    """q, k, v, g, beta, state as the mixer makes them; a memory of about ten tokens."""
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((B, T, Hk, Dk)) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = rng.standard_normal((B, T, Hk * group, Dv))
    g = np.log(rng.uniform(0.8, 1, (B, T, Hk * group)))
    beta = rng.uniform(0, 1, (B, T, Hk * group))
    state = rng.standard_normal((B, Hk * group, Dv, Dk)) * 0.3
    q, k, v = (mx.array(x.astype(np.float32)).astype(dtype) for x in (q * Dk**-0.5, k, v))
    return [q, k, v, *(mx.array(x.astype(np.float32)) for x in (g, beta, state))]


def first_key(k):
    return np.broadcast_to(k[:, :1], k.shape)


def near_equal(k):
    k = k[:, :1] + 0.14 * k  # cosine about 0.99
    return k / np.linalg.norm(k, axis=-1, keepdims=True)


def every(period, k):
    return np.arange(k.shape[1])[:, None] % period


# What each case makes of k, v, g, beta; None keeps the random one.
ADVERSARIAL = {
    "random": lambda k, v, g, beta: (None, None, None, None),
    "no_decay": lambda k, v, g, beta: (None, None, 0, None),
    "zero_decay": lambda k, v, g, beta: (None, None, -np.inf, None),
    "decay_1e-30": lambda k, v, g, beta: (None, None, np.log(1e-30), None),
    "mixed_zero_and_no_decay": lambda k, v, g, beta: (None, None, np.where(every(5, k) < 2, -np.inf, 0), None),
    "strong_decay_then_weak": lambda k, v, g, beta: (None, None, np.where(every(7, k) == 0, -80, -1e-3), None),
    "slow_decay_full_writes": lambda k, v, g, beta: (None, None, g / 200, 1),
    "no_writes": lambda k, v, g, beta: (None, None, None, 0),
    "repeated_key_full_writes": lambda k, v, g, beta: (first_key(k), None, 0, 1),
    "repeated_key_half_writes": lambda k, v, g, beta: (first_key(k), None, 0, 0.5),
    "alternating_key_full_writes": lambda k, v, g, beta: (first_key(k) * (1 - 2 * every(2, k))[..., None], None, 0, 1),
    "near_equal_keys_full_writes": lambda k, v, g, beta: (near_equal(k), None, 0, 1),
    "three_keys_full_writes": lambda k, v, g, beta: (k[:, np.arange(k.shape[1]) % min(3, k.shape[1])], None, 0, 1),
    "keys_of_zeros": lambda k, v, g, beta: (0 * k, None, None, None),
    "some_keys_of_zeros_full_writes": lambda k, v, g, beta: (k * (every(3, k) > 0)[..., None], None, 0, 1),
    "big_values_full_writes": lambda k, v, g, beta: (None, 1e3 * v, 0, 1),
}


def adversarial_problem(name, T, **sizes):
    """`problem` with what its case changes."""
    q, *changeable, state = problem(T, **sizes)
    arrays = [np.array(x) for x in changeable]
    changes = zip(arrays, ADVERSARIAL[name](*arrays))
    changed = (old if new is None else np.broadcast_to(new, old.shape).astype(np.float32) for old, new in changes)
    return [q, *(mx.array(x) for x in changed), state]
