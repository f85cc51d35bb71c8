// The state behind the first n tokens of a tape, from the state before them.
//
//     S = exp(g_t) S;   S = S + d_t k_t^T,   t < n;   d_t from the tape that `gated_delta_scan` wrote
//
// in      state [B, Hv, Dv, Dk], g [B, T, Hv], tape [B, T, Hv, Dv] float32;  k [B, T, Hk, Dk] in Key;  n an integer
// out     state_out [B, Hv, Dv, Dk] float32
//
// lane    a quarter of one row of S, as in `gated_delta_scan`
// grid    (32, Dv / 8, B Hv) threads; no SIMD-group waits for another
//
// needs   heads as `gated_delta_scan` does, checked by `kernels_fit` in qwen_mlx/kernels/gated_delta_arguments.py;
//         0 <= n <= T, checked by `gated_delta_replay` in qwen_mlx/kernels/gated_delta_replay.py
//
// The two lines that change S are those of `gated_delta_scan`, in its order, on its operands: the result is, bit for bit,
// the state of a scan that stopped after n tokens.
//
// Occupancy and traffic, for one sequence, Dk = Dv = 128; a prediction, as nobody has measured it:
//                                       0.8B: 16 key, 16 value heads       9B: 16 key, 32 value heads
//     SIMD-groups (of 8 rows)           256: 26 a core of 10, 6 of 40      512: 51 a core of 10, 13 of 40
//     S read and written, once          2.0 MiB                            4.0 MiB
//     k, g, tape a token                16.1 KiB (k in float32)            24.1 KiB
// Every SIMD-group reads k of its head anew from the caches: 128 KiB a token at 0.8B, if equal addresses are one access.
// A copy of S kept for every token instead would be 1 or 2 MiB a token and layer.

constexpr int LANES = 4;
constexpr int ROWS = 8;
constexpr int BLOCKS = Dk / (4 * LANES);

const int T = k_shape[1], Hk = k_shape[2], Hv = tape_shape[2], Dv = tape_shape[3];
const int part = int(thread_index_in_simdgroup) % LANES;
const int row = int(thread_position_in_grid.y) * ROWS + int(thread_index_in_simdgroup) / LANES;
const int head = int(thread_position_in_grid.z) % Hv;
const int key_head = head / (Hv / Hk);
const size_t batch = thread_position_in_grid.z / uint(Hv);

auto k_t = reinterpret_cast<const device metal::vec<Key, 4>*>(k + (batch * T * Hk + key_head) * Dk + 4 * part);
auto g_t = g + batch * T * Hv + head;
auto tape_t = tape + (batch * T * Hv + head) * Dv + row;

const size_t state_row = (size_t(thread_position_in_grid.z) * Dv + row) * Dk + 4 * part;
auto state_in = reinterpret_cast<const device float4*>(state + state_row);
float4 S[BLOCKS];
for (int i = 0; i < BLOCKS; ++i) {
  S[i] = state_in[LANES * i];
}

for (int t = 0; t < n; ++t) {
  const float alpha = metal::exp(float(*g_t));
  const float delta = *tape_t;
  for (int i = 0; i < BLOCKS; ++i) {
    S[i] = S[i] * alpha;
    S[i] = metal::fma(float4(k_t[LANES * i]), float4(delta), S[i]);
  }
  k_t += Hk * Dk / 4;
  g_t += Hv;
  tape_t += Hv * Dv;
}

auto state_end = reinterpret_cast<device float4*>(state_out + state_row);
for (int i = 0; i < BLOCKS; ++i) {
  state_end[LANES * i] = S[i];
}
