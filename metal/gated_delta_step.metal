// One decoded token through a Gated DeltaNet layer, from its input projections to its output projection.
//
//     y = silu(sum_i w_i x_{i}) over the K-1 columns kept and the new one;   q, k normalized as in `causal_conv1d`
//     alpha = exp(-exp(A_log) softplus(a + dt_bias));   beta = sigmoid(b)
//     S = alpha S;   S = S + beta (v - S k) k^T;   o = S q                  (arXiv 2412.06464, equation 10)
//     y = o / sqrt(mean(o^2) + eps) * gain * silu(z)                        (mean over a head)
//
// in      qkv [B, 1, Cn], z [B, 1, Hv Dv], a, b [B, 1, Hv] any float, each perhaps part of longer rows: z from its column
//         ZStart on, b from BStart on;  weight [Cn, K], conv_state [B, K-1, Cn] any float;
//         A_log, dt_bias [Hv], gain [Dv], state [B, Hv, Dv, Dk] float32;  eps a float
// out     y [B, 1, Hv, Dv] and conv_out [B, K-1, Cn] in X;  state_out [B, Hv, Dv, Dk] float32
//
// lane    a quarter of one row of S, 4 floats of every 16, so that four lanes read 64 contiguous bytes at a time
// SIMD    eight rows of S, then the next eight that no other SIMD-group has
// group   all of one value head: its convolved channels and its o lie in threadgroup memory; two barriers
// grid    (32, SIMD-groups of a threadgroup, B Hv) threads
//
// needs   heads as `gated_delta_scan` does, and K >= 2; checked by `step_fits` in qwen_mlx/kernels/gated_delta_step.py
//
// Value heads that share a key head each convolve it anew; the first of them stores its columns.
//
// Occupancy and traffic, for one sequence, Dk = Dv = 128, eight SIMD-groups; a prediction, as nobody has measured it:
//                                       0.8B: 16 key, 16 value heads       9B: 16 key, 32 value heads
//     threadgroups                      16: 2 a core of 10, 16 of 40 busy  32: 3 a core of 10, 32 of 40 busy
//     S read and written                2.0 MiB                            4.0 MiB
//     all else                          0.14 MiB (16 bits)                 0.19 MiB
//     floor at 120 and at 546 GB/s      19 us and 4.1 us                   37 us and 8.0 us
// Rows split over more threadgroups would keep 40 cores busy at 16 heads, but could not see the whole of o, so that the
// gated norm would be a second launch. The idle cores cost nothing, as long as the busy ones draw all that the memory
// gives: with 32 KiB a threadgroup under way and some 0.7 us to memory, 16 threadgroups draw 750 GB/s. So one launch.
// On 10 cores all are busy either way.

constexpr int LANES = 4;
constexpr int ROWS = 8;
constexpr int BLOCKS = Dk / (4 * LANES);

threadgroup float mixed[2 * Dk + Dv];  // q, k, v of this head
threadgroup float o[Dv];

const int Cn = conv_state_shape[2], Hv = state_shape[1];
const int Hk = (Cn - Hv * Dv) / (2 * Dk);
const int simdgroups = int(threads_per_threadgroup.y);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int thread_index = int(thread_index_in_threadgroup);
const int head = int(threadgroup_position_in_grid.z) % Hv;
const int key_head = head / (Hv / Hk);
const size_t batch = threadgroup_position_in_grid.z / uint(Hv);
const size_t batch_head = threadgroup_position_in_grid.z;

for (int i = thread_index; i < 2 * Dk + Dv; i += 32 * simdgroups) {
  const int channel = i < Dk ? key_head * Dk + i
      : i < 2 * Dk           ? (Hk + key_head) * Dk + i - Dk
                             : 2 * Hk * Dk + head * Dv + i - 2 * Dk;
  const bool stores = i >= 2 * Dk || head % (Hv / Hk) == 0;
  float sum = 0.0f;
  for (int j = 0; j < K; ++j) {
    const float column = j < K - 1 ? float(conv_state[(batch * (K - 1) + j) * Cn + channel])
                                   : float(qkv[batch * qkv_shape[2] + channel]);
    const float tap = float(weight[channel * K + j]);
    sum = metal::fma(tap, column, sum);
    if (j > 0 && stores) {
      conv_out[(batch * (K - 1) + j - 1) * Cn + channel] = static_cast<X>(column);
    }
  }
  mixed[i] = sum / (1.0f + metal::exp(-sum));
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float q_squares = 0.0f, k_squares = 0.0f;
for (int i = lane; i < Dk; i += 32) {
  q_squares = metal::fma(mixed[i], mixed[i], q_squares);
  k_squares = metal::fma(mixed[Dk + i], mixed[Dk + i], k_squares);
}
const float q_norm = metal::rsqrt(simd_sum(q_squares) + 1e-6f);
const float k_scale = metal::rsqrt(simd_sum(k_squares) + 1e-6f);
const float q_scale = q_norm * metal::rsqrt(float(Dk));

const float gate = float(a[batch * a_shape[2] + head]) + dt_bias[head];
const float softplus = metal::max(gate, 0.0f) + log1p(metal::exp(-metal::abs(gate)));
const float alpha = metal::exp(-metal::exp(A_log[head]) * softplus);
const float beta = 1.0f / (1.0f + metal::exp(-float(b[batch * b_shape[2] + BStart + head])));

const int part = lane % LANES;
for (int block = simdgroup; block < Dv / ROWS; block += simdgroups) {
  const int row = block * ROWS + lane / LANES;
  const size_t state_row = (batch_head * Dv + row) * Dk + 4 * part;
  auto state_in = reinterpret_cast<const device float4*>(state + state_row);
  auto state_end = reinterpret_cast<device float4*>(state_out + state_row);
  float4 S[BLOCKS];
  for (int i = 0; i < BLOCKS; ++i) {
    S[i] = state_in[LANES * i];
  }
  float4 products = float4(0.0f);
  for (int i = 0; i < BLOCKS; ++i) {
    const int at = Dk + 4 * (LANES * i + part);
    const float4 keys = k_scale * float4(mixed[at], mixed[at + 1], mixed[at + 2], mixed[at + 3]);
    S[i] = S[i] * alpha;
    products = metal::fma(S[i], keys, products);
  }
  float recalled = (products.x + products.y) + (products.z + products.w);
  recalled += simd_shuffle_xor(recalled, 1);
  recalled += simd_shuffle_xor(recalled, 2);
  const float delta = beta * (mixed[2 * Dk + row] - recalled);

  products = float4(0.0f);
  for (int i = 0; i < BLOCKS; ++i) {
    const int at = 4 * (LANES * i + part);
    const float4 keys = k_scale * float4(mixed[Dk + at], mixed[Dk + at + 1], mixed[Dk + at + 2], mixed[Dk + at + 3]);
    S[i] = metal::fma(keys, float4(delta), S[i]);
    state_end[LANES * i] = S[i];
    const float4 queries = q_scale * float4(mixed[at], mixed[at + 1], mixed[at + 2], mixed[at + 3]);
    products = metal::fma(S[i], queries, products);
  }
  float read = (products.x + products.y) + (products.z + products.w);
  read += simd_shuffle_xor(read, 1);
  read += simd_shuffle_xor(read, 2);
  if (part == 0) {
    o[row] = read;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float squares = 0.0f;
for (int i = lane; i < Dv; i += 32) {
  squares = metal::fma(o[i], o[i], squares);
}
const float norm = metal::rsqrt(simd_sum(squares) / Dv + eps);
for (int i = thread_index; i < Dv; i += 32 * simdgroups) {
  const float open = float(z[batch * z_shape[2] + ZStart + head * Dv + i]);
  y[batch_head * Dv + i] = static_cast<X>(o[i] * norm * gain[i] * (open / (1.0f + metal::exp(-open))));
}
