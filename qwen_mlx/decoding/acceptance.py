"""Which drafts stand: the exact rule of speculative sampling (arXiv 2211.17192, algorithm 1).

In: k drafted tokens of one reply, what they were drawn from, and the model's logits before, between and after them.
Out: how many of them stand and the token that follows those, lazily. However good the drafts, the tokens that stand
have the distribution that the sampler would have drawn from without them. Knows neither the models nor where drafts
come from, and keeps no state: the caller lets the sampler `observe` the tokens that stand.
"""

import math

import mlx.core as mx

from qwen_mlx.decoding.sampling import Sampler


def accept(
    sampler: Sampler, logits: mx.array, *, drafts: mx.array, draft_logits: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """How many of the k drafts stand, and the token after them: -> ([] int32, [1] uint32), not yet evaluated.

        logits        [k + 1, V]  the model's, unprocessed; row i is the place of draft i, the last that after all
        drafts        [k]         token ids; k may be 0, which leaves a plain draw
        draft_logits  [k, V]      row i is what draft i was drawn from, processed, float32; None where drafts were
                                  proposed outright (q_i is then 1 at d_i)

    With p_i the sampler's distribution after the drafts before i: while all before it stand, d_i stands with
    probability min(1, p_i(d_i) / q_i(d_i)). The token after is drawn from norm(max(p_i - q_i, 0)) where d_i fell, and
    from p_{k+1} where none did. At temperature 0 each draft stands that the likeliest token agrees with.

    Only the sampler's keys move on, not its counts. Drafts must be drawn with keys of this sampler (`next_key`), not
    with those of a copy, which are the ones used here. ValueError for shapes that do not belong together.
    """
    k = drafts.size
    if logits.shape[0] != k + 1:
        raise ValueError(f"{k} drafts need {k + 1} rows of logits, not {logits.shape[0]}")
    if draft_logits is not None and draft_logits.shape != (k, logits.shape[1]):
        raise ValueError(f"draft_logits must have shape {[k, logits.shape[1]]}, not {list(draft_logits.shape)}")
    places = sampler.along(drafts)
    if sampler.params.temperature == 0:
        likeliest = places.greedy(logits)
        accepted = _leading(likeliest[:k] == drafts)
        return accepted, likeliest[accepted][None]
    scores = places.processed_logits(logits)
    if k == 0:
        return mx.array(0), _draw(scores[0], sampler.next_key())
    p = mx.softmax(scores, axis=-1)
    q = mx.arange(p.shape[1]) == drafts[:, None] if draft_logits is None else mx.softmax(draft_logits, axis=-1)
    p_drafts, q_drafts = (mx.take_along_axis(x, drafts[:, None], axis=-1)[:, 0] for x in (p[:k], q))
    # Not u < p / q, which is not a number where both are 0. As u is below 1, equal p and q always stand.
    accepted = _leading(mx.random.uniform(shape=(k,), key=sampler.next_key()) * q_drafts < p_drafts)
    rest = _rest(p[accepted], q[mx.minimum(accepted, k - 1)])
    return accepted, _draw(mx.where(accepted < k, rest, scores[accepted]), sampler.next_key())


def _leading(stands: mx.array) -> mx.array:
    """How many come before the first that falls: [k] bool -> [] int32."""
    return mx.sum(mx.cumprod(stands.astype(mx.int32)))


def _rest(p: mx.array, q: mx.array) -> mx.array:
    """The logits of the token in place of a draft that fell, log max(p - q, 0): [V], [V] -> [V].

    Where p and q differ by rounding alone nothing may be left of p - q; p then stands in for it.
    """
    excess = mx.log(mx.maximum(p - q, 0))
    return mx.where(mx.any(excess > -math.inf), excess, mx.log(p))


def _draw(scores: mx.array, key: mx.array) -> mx.array:
    """One token from the softmax: [V] -> [1] uint32.

    From a vector MLX draws with Gumbel noise, which leaves -inf alone. From a matrix of one row it draws by float32
    running sums (ml-explore/mlx#4177); added up in parallel these may rise by rounding where the probability is 0.
    """
    return mx.random.categorical(scores, key=key)[None]
