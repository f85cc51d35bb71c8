// The gated delta rule, token after token.
//
//     S = exp(g_t) S;   d_t = beta_t (v_t - S k_t);   S = S + d_t k_t^T;   o_t = S q_t
//     (Yang et al. 2024, arXiv 2412.06464, equation 10)
//
// in      q, k [B, T, Hk, Dk] in Key;  v [B, T, Hv, Dv] any float;  g, beta [B, T, Hv] and S [B, Hv, Dv, Dk] float32
// out     o [B, T, Hv, Dv] and the new S, float32; where TAPE is defined, also every d_t, tape [B, T, Hv, Dv] float32
//
// lane    a quarter of one row of S, in registers over all T tokens: 4 floats of every 16, so that the four lanes of a
//         row read 64 contiguous bytes at a time
// SIMD    eight rows; a sum over a row is two shuffles. SIMD-groups neither share memory nor wait for each other, so
//         their number in a threadgroup does not matter to the result
// grid    (32, Dv / 8, B Hv) threads
//
// needs   Dk of 32, 64, 96 or 128, Dv % 8 == 0, Hv of 1, 2, 3 or 4 times Hk: what the tests run, and no released model
//         has other ones; checked by `kernels_fit` in qwen_mlx/kernels/gated_delta_arguments.py
//
// Every product that is summed is an explicit fma, and S is decayed in a product of its own: the compiler has nothing
// left to contract, so `gated_delta_replay`, which repeats the two lines that change S, ends in the same bits.
//
// Occupancy and traffic, for one sequence (B = 1), Dk = Dv = 128; a prediction, as nobody has measured it:
//                                       0.8B: 16 key, 16 value heads       9B: 16 key, 32 value heads
//     SIMD-groups (of 8 rows)           256: 26 a core of 10, 6 of 40      512: 51 a core of 10, 13 of 40
//     S read and written, once          2.0 MiB                            4.0 MiB
//     q, k, v, g, beta, o a token       32.1 KiB (q, k, v in float32)      48.2 KiB
//     tape a token                      8 KiB                              16 KiB
// Every SIMD-group reads q and k of its head anew, 1 KiB a token, from the caches: 256 KiB a token at 0.8B, if equal
// addresses of its eight rows are one access. At T = 8 the state is still nine tenths of the traffic to memory.

constexpr int LANES = 4;
constexpr int ROWS = 8;
constexpr int BLOCKS = Dk / (4 * LANES);

const int T = q_shape[1], Hk = q_shape[2], Hv = v_shape[2], Dv = v_shape[3];
const int part = int(thread_index_in_simdgroup) % LANES;
const int row = int(thread_position_in_grid.y) * ROWS + int(thread_index_in_simdgroup) / LANES;
const int head = int(thread_position_in_grid.z) % Hv;
const int key_head = head / (Hv / Hk);
const size_t batch = thread_position_in_grid.z / uint(Hv);

const size_t first_key = (batch * T * Hk + key_head) * Dk + 4 * part;
auto q_t = reinterpret_cast<const device metal::vec<Key, 4>*>(q + first_key);
auto k_t = reinterpret_cast<const device metal::vec<Key, 4>*>(k + first_key);
auto g_t = g + batch * T * Hv + head;
auto beta_t = beta + batch * T * Hv + head;
const size_t first_value = (batch * T * Hv + head) * Dv + row;
auto v_t = v + first_value;
auto o_t = o + first_value;
#ifdef TAPE
auto tape_t = tape + first_value;
#endif

const size_t state_row = (size_t(thread_position_in_grid.z) * Dv + row) * Dk + 4 * part;
auto state_in = reinterpret_cast<const device float4*>(state + state_row);
float4 S[BLOCKS];
for (int i = 0; i < BLOCKS; ++i) {
  S[i] = state_in[LANES * i];
}

for (int t = 0; t < T; ++t) {
  const float alpha = metal::exp(float(*g_t));
  float4 keys[BLOCKS];
  float4 products = float4(0.0f);
  for (int i = 0; i < BLOCKS; ++i) {
    keys[i] = float4(k_t[LANES * i]);
    S[i] = S[i] * alpha;
    products = metal::fma(S[i], keys[i], products);
  }
  float recalled = (products.x + products.y) + (products.z + products.w);
  recalled += simd_shuffle_xor(recalled, 1);
  recalled += simd_shuffle_xor(recalled, 2);
  const float delta = float(*beta_t) * (float(*v_t) - recalled);

  products = float4(0.0f);
  for (int i = 0; i < BLOCKS; ++i) {
    S[i] = metal::fma(keys[i], float4(delta), S[i]);
    products = metal::fma(S[i], float4(q_t[LANES * i]), products);
  }
  float read = (products.x + products.y) + (products.z + products.w);
  read += simd_shuffle_xor(read, 1);
  read += simd_shuffle_xor(read, 2);
  if (part == 0) {
    *o_t = read;
#ifdef TAPE
    *tape_t = delta;
#endif
  }

  q_t += Hk * Dk / 4;
  k_t += Hk * Dk / 4;
  g_t += Hv;
  beta_t += Hv;
  v_t += Hv * Dv;
  o_t += Hv * Dv;
#ifdef TAPE
  tape_t += Hv * Dv;
#endif
}

auto state_end = reinterpret_cast<device float4*>(state_out + state_row);
for (int i = 0; i < BLOCKS; ++i) {
  state_end[LANES * i] = S[i];
}
