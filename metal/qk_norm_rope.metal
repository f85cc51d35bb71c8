// The norms of queries and keys and their rotation to their places in the sequence; the values move along.
//
//     y = x / sqrt(mean(x^2) + eps) * gain                                   (mean over a head)
//     with a = position * frequencies[j]:  y_j = y_j cos a - y_{j+R/2} sin a;  y_{j+R/2} = y_{j+R/2} cos a + y_j sin a
//     for j < R / 2; what lies behind the first R elements passes through    (half-split RoPE, arXiv 2104.09864)
//
// in      q [B, T, Hq, 2 Dh] in X, each head's query before its gate;  k, v [B, T, Hkv, Dh] in X;
//         q_gain, k_gain [Dh], frequencies [R / 2] float32;  eps a float;  offset, the place of the first token, an int
// out     q_out [B, Hq, T, Dh] and keys_values [2, B, Hkv, T, Dh] in X, the values as they came
//
// lane    every 32nd element of a head, in registers; both elements of a pair are the lane's own, as R / 2 is a
//         multiple of 32
// SIMD    one head of one token; SIMD-groups neither share memory nor wait for each other
// grid    (32, Hq + 2 Hkv, B T) threads: queries, then keys, then values
//
// needs   Dh % 32 == 0, R % 64 == 0, R <= Dh; checked by `heads_fit` in qwen_mlx/kernels/qk_norm_rope.py
//
// Occupancy and traffic of a decoded token, Dh = 256, R = 64; a prediction, as nobody has measured it:
//                                       0.8B: 8 query, 2 key heads         9B: 16 query, 4 key heads
//     threadgroups of 4 SIMD-groups     3, each on a core of its own       6, each on a core of its own
//     bytes, 16 bits                    12 KiB and gains of 2 KiB          24 KiB and gains of 2 KiB
// Apart, with 16-bit activations, these are ten launches: of queries and of keys each a cast, a norm, its rounding and a
// rotation, and the copies of keys and values into one array.

constexpr int ELEMENTS = Dh / 32;  // of a lane
constexpr int HALF = R / 64;       // elements of a lane in half of what is rotated

const int lane = int(thread_index_in_simdgroup);
const int T = q_shape[1], Hq = q_shape[2], Hkv = k_shape[2];
const int head = int(thread_position_in_grid.y);
const int batch = int(thread_position_in_grid.z) / T;
const int t = int(thread_position_in_grid.z) % T;
const bool query = head < Hq, value = head >= Hq + Hkv;
const int kv_head = (head - Hq) % Hkv;
const size_t token = size_t(batch) * T + t;
const size_t at = query ? (token * Hq + head) * 2 * Dh + lane : (token * Hkv + kv_head) * Dh + lane;
const size_t to = query ? ((size_t(batch) * Hq + head) * T + t) * Dh + lane
                        : (((value ? q_shape[0] : 0) + size_t(batch)) * Hkv + kv_head) * T * Dh + t * Dh + lane;

if (value) {
  for (int i = 0; i < ELEMENTS; ++i) {
    keys_values[to + 32 * i] = v[at + 32 * i];
  }
  return;
}

float values[ELEMENTS];
float squares = 0.0f;
for (int i = 0; i < ELEMENTS; ++i) {
  values[i] = query ? float(q[at + 32 * i]) : float(k[at + 32 * i]);
  squares = metal::fma(values[i], values[i], squares);
}
const float norm = metal::rsqrt(simd_sum(squares) / Dh + eps);
for (int i = 0; i < ELEMENTS; ++i) {
  values[i] = values[i] * norm * (query ? q_gain[lane + 32 * i] : k_gain[lane + 32 * i]);
}
for (int i = 0; i < HALF; ++i) {
  const float angle = float(offset + t) * frequencies[lane + 32 * i];
  const float cosine = metal::precise::cos(angle), sine = metal::precise::sin(angle);
  const float left = values[i], right = values[i + HALF];
  values[i] = left * cosine - right * sine;
  values[i + HALF] = right * cosine + left * sine;
}
auto heads = query ? q_out : keys_values;
for (int i = 0; i < ELEMENTS; ++i) {
  heads[to + 32 * i] = static_cast<X>(values[i]);
}
