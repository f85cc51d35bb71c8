// The depthwise causal convolution with SiLU, and the normalization of queries and keys behind it.
//
//     y_t = silu(sum_i w_i x_{t-K+1+i}),  i = 0..K-1: tap K-1 weighs the current token
//     q = y / sqrt(sum(y^2) + 1e-6) / sqrt(Dk);  k = y / sqrt(sum(y^2) + 1e-6);  v = y      (sums over a head)
//
// in      x [B, T, Cn] in X, its channels being Hk heads of queries, Hk heads of keys, then values; weight [Cn, K] any
//         float;  conv_state [B, K-1, Cn] any float, the columns before x;  ends [B] int, tokens up to the last real one
// out     q, k [B, T, Hk, Dk] and v [B, T, Cn - 2 Hk Dk] float32;  conv_out [B, K-1, Cn] in X, the K-1 columns that end
//         at `ends`
//
// lane    every 32nd channel of a slot, its K taps and the window behind it in registers
// SIMD    a slot of Dk channels, which is a head of queries or keys, or as many values (fewer in the last slot), over
//         TOKENS tokens; SIMD-groups neither share memory nor wait for each other
// grid    (32, ceil(Cn / Dk), B ceil(T / TOKENS)) threads
//
// needs   Dk of 32, 64, 96 or 128, K >= 2; checked by `conv_fits` in qwen_mlx/kernels/causal_conv1d.py
//
// Nothing is rounded between x and the results, which are float32: the delta rule gets every bit.
//
// Occupancy and traffic, for one sequence, Cn = 6144 (0.8B) and 8192 (9B), Dk = 128, TOKENS = 8; a prediction, as nobody
// has measured it:
//                                       0.8B                               9B
//     SIMD-groups, T = 8                48: 5 a core of 10, 1 of 40        64: 6 a core of 10, 2 of 40
//     SIMD-groups, T = 2048             12,288                             16,384
//     x read, q, k, v written a token   12 KiB and 24 KiB (x in 16 bits)   16 KiB and 32 KiB
//     x from the caches                 11/8 of its size at TOKENS = 8, 4 times its size at one token a SIMD-group
//     taps from the caches a token      6 KiB at TOKENS = 8                8 KiB

constexpr int CHANNELS = Dk / 32;  // of a lane

const int T = x_shape[1], Cn = x_shape[2];
const int lane = int(thread_index_in_simdgroup);
const int slot = int(thread_position_in_grid.y);
const int blocks = (T + TOKENS - 1) / TOKENS;
const int block = int(thread_position_in_grid.z) % blocks;
const size_t batch = thread_position_in_grid.z / uint(blocks);
const int first = slot * Dk + lane;
const int start = block * TOKENS;
const int stop = metal::min(T, start + TOKENS);

auto columns = x + batch * T * Cn;
auto before = conv_state + batch * (K - 1) * Cn;

float taps[CHANNELS][K];
float window[CHANNELS][K];  // of the token about to be convolved: from the oldest column to its own
for (int i = 0; i < CHANNELS; ++i) {
  const int channel = first + 32 * i;
  for (int j = 0; j < K; ++j) {
    taps[i][j] = channel < Cn ? float(weight[channel * K + j]) : 0.0f;
  }
  for (int j = 1; j < K; ++j) {
    const int t = start - K + j;
    window[i][j] = channel >= Cn ? 0.0f
        : t < 0                  ? float(before[(t + K - 1) * Cn + channel])
                                 : float(columns[size_t(t) * Cn + channel]);
  }
}

for (int t = start; t < stop; ++t) {
  float y[CHANNELS];
  float squares = 0.0f;
  for (int i = 0; i < CHANNELS; ++i) {
    const int channel = first + 32 * i;
    for (int j = 0; j < K - 1; ++j) {
      window[i][j] = window[i][j + 1];
    }
    window[i][K - 1] = channel < Cn ? float(columns[size_t(t) * Cn + channel]) : 0.0f;
    float sum = 0.0f;
    for (int j = 0; j < K; ++j) {
      sum = metal::fma(taps[i][j], window[i][j], sum);
    }
    y[i] = sum / (1.0f + metal::exp(-sum));
    squares = metal::fma(y[i], y[i], squares);
  }
  if (slot < 2 * Hk) {
    const float norm = metal::rsqrt(simd_sum(squares) + 1e-6f);
    const bool query = slot < Hk;
    const float scale = query ? norm * metal::rsqrt(float(Dk)) : norm;
    auto heads = query ? q : k;
    const size_t at = ((batch * T + t) * Hk + slot % Hk) * Dk + lane;
    for (int i = 0; i < CHANNELS; ++i) {
      heads[at + 32 * i] = y[i] * scale;
    }
  } else {
    const int values = Cn - 2 * Hk * Dk;
    for (int i = 0; i < CHANNELS; ++i) {
      const int channel = first + 32 * i;
      if (channel < Cn) {
        v[(batch * T + t) * values + channel - 2 * Hk * Dk] = y[i];
      }
    }
  }
}

if (block == 0) {
  for (int i = 0; i < CHANNELS; ++i) {
    const int channel = first + 32 * i;
    for (int j = 0; j < K - 1 && channel < Cn; ++j) {
      const int t = ends[batch] - (K - 1) + j;
      const float column = t < 0 ? float(before[(t + K - 1) * Cn + channel]) : float(columns[size_t(t) * Cn + channel]);
      conv_out[(batch * (K - 1) + j) * Cn + channel] = static_cast<X>(column);
    }
  }
}
