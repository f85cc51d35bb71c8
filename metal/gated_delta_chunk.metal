// The gated delta rule, sixteen tokens at a time.
//
//     With D_ij the decay from token j to token i of a chunk, D_i that from the chunk's start and D'_j that to its end:
//     A = tril(diag(beta) K K^T * D, -1);   U = (I + A)^-1 diag(beta) (V - diag(D_i) K S^T)
//     O = diag(D_i) Q S^T + tril(Q K^T * D) U;   S = D_C S + U^T diag(D'_j) K
//     (WY form; Yang et al. 2024, arXiv 2412.06464, section 3.3)
//
// in      q, k [B, T, Hk, Dk] and v [B, T, Hv, Dv] any float;  g, beta [B, T, Hv] and S [B, Hv, Dv, Dk] float32
// out     o [B, T, Hv, Dv] and the new S, float32
//
// SIMD    eight rows of S, held as S^T in Dk / 8 matrices of 8 x 8 from the first chunk to the last
// group   SIMDGROUPS SIMD-groups of one head (fewer in the last group of a head), which share K and Q of the chunk, the
//         decays, and the two products of C x C, of which each makes some tiles; three barriers a chunk
// grid    (32, Dv / 8, B Hv) threads
//
// needs   Dk of 32, 64, 96 or 128, Dv % 8 == 0, Hv of 1, 2, 3 or 4 times Hk: what the tests run, and no released model
//         has other ones; checked by `kernels_fit` in qwen_mlx/kernels/gated_delta_arguments.py
//
// The last chunk may be ragged: its missing tokens neither decay nor write. Decays are products of decays, never a
// difference of their logarithms, which is NaN after a decay of zero and loses digits after a strong one; no factor is
// above one, so nothing overflows. (I + A)^-1 goes by diagonal blocks of 1, 2, 4, 8, merged pairwise: if X inverts the
// blocks and L is what lies below the diagonal inside the merged ones, X - X L X inverts those. The shorter series
// (I - A)(I + A^2)(I + A^4)... cancels to nothing for near-equal keys.
//
// Occupancy and traffic, for one sequence, Dk = Dv = 128, eight SIMD-groups; a prediction, as nobody has measured it:
//                                       0.8B: 16 key, 16 value heads       9B: 16 key, 32 value heads
//     threadgroups                      32: 3 a core of 10, 32 of 40 busy  64: 6 a core of 10, 2 on 24 of 40
//     threadgroup memory                19.6 KiB of 32: one group a core at a time
//     S read and written, once          2.0 MiB                            4.0 MiB
//     q, k, v, g, beta, o a token       32.1 KiB (q, k, v in float32)      48.2 KiB
//     K and Q from the caches           32 KiB a token: an eighth of       64 KiB
//                                       what `gated_delta_scan` reads
//     8 x 8 products a SIMD-group       112 for 16 tokens, and 16 or none of the shared ones: 8 a token, where the scan
//                                       has as many multiplications as 6 products, 4 shuffles, and a wait for each token
// A chunk costs as much for one token as for sixteen, so the scan serves up to sixteen.
//
// The loops over matrices are unrolled by order: rolled, their index would be a variable, and the matrices would lie in
// memory instead of registers.

constexpr int C = 16;
constexpr int PITCH = Dk + 4;  // rows begin four banks apart, so that a column of a tile does not wait on one bank
constexpr int TILES = Dk / 8;

threadgroup float K[C * PITCH];
threadgroup float Q[C * PITCH];
threadgroup float KK[C * C];
threadgroup float QK[C * C];
threadgroup float decay[C * C];  // D, with ones on and above the diagonal
threadgroup float alphas[C];
threadgroup float betas[C];

const int T = q_shape[1], Hk = q_shape[2], Hv = v_shape[2], Dv = v_shape[3];
const int simdgroups = int(threads_per_threadgroup.y);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const int thread_index = int(thread_index_in_threadgroup);
const int threads = 32 * simdgroups;
const int first_row = int(thread_position_in_grid.y) * 8;
const int head = int(thread_position_in_grid.z) % Hv;
const int key_head = head / (Hv / Hk);
const size_t batch = thread_position_in_grid.z / uint(Hv);

// Where the two elements of a matrix that a lane holds stand: (m, n) and (m, n + 1).
const int lane = int(thread_index_in_simdgroup);
const int m = ((lane / 4) & 4) + (lane / 2) % 4;
const int n = ((lane / 4) & 2) * 2 + (lane % 2) * 2;

auto q_c = q + (batch * T * Hk + key_head) * Dk;
auto k_c = k + (batch * T * Hk + key_head) * Dk;
auto g_c = g + batch * T * Hv + head;
auto beta_c = beta + batch * T * Hv + head;
auto v_c = v + (batch * T * Hv + head) * Dv + first_row;
auto o_c = o + (batch * T * Hv + head) * Dv + first_row;

const size_t state_rows = (size_t(thread_position_in_grid.z) * Dv + first_row) * Dk;
simdgroup_float8x8 S[TILES];  // S[j]: elements 8 j to 8 j + 7 of the rows, transposed
#pragma clang loop unroll(full)
for (int j = 0; j < TILES; ++j) {
  simdgroup_load(S[j], state + state_rows + 8 * j, Dk, ulong2(0, 0), true);
}

for (int start = 0; start < T; start += C) {
  const int count = metal::min(C, T - start);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the chunk before has been read
  for (int i = thread_index; i < C * Dk; i += threads) {
    const int t = i / Dk, d = i % Dk;
    K[t * PITCH + d] = t < count ? float(k_c[t * Hk * Dk + d]) : 0.0f;
    Q[t * PITCH + d] = t < count ? float(q_c[t * Hk * Dk + d]) : 0.0f;
  }
  for (int t = thread_index; t < C; t += threads) {
    alphas[t] = t < count ? metal::exp(float(g_c[t * Hv])) : 1.0f;
    betas[t] = t < count ? float(beta_c[t * Hv]) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int i = thread_index; i < C * C; i += threads) {
    float product = 1.0f;
    for (int t = i % C + 1; t <= i / C; ++t) {
      product *= alphas[t];
    }
    decay[i] = product;
  }
  // Tiles (0, 0), (1, 0) and (1, 1) of K K^T and of Q K^T.
  for (int job = simdgroup; job < 6; job += simdgroups) {
    const int tile_row = job % 3 > 0 ? 8 : 0, tile_column = job % 3 > 1 ? 8 : 0;
    threadgroup const float* left = (job < 3 ? K : Q) + tile_row * PITCH;
    simdgroup_float8x8 a, b;
    simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8>(0.0f);
    #pragma clang loop unroll(full)
    for (int j = 0; j < TILES; ++j) {
      simdgroup_load(a, left + 8 * j, PITCH);
      simdgroup_load(b, K + tile_column * PITCH + 8 * j, PITCH, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(sum, a, b, sum);
    }
    simdgroup_store(sum, (job < 3 ? KK : QK) + tile_row * C + tile_column, C);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // (I + A)^-1: its two tiles on the diagonal, and the one below them.
  simdgroup_float8x8 inverse[2], corner, product, L;
  #pragma clang loop unroll(full)
  for (int r = 0; r < 2; ++r) {
    const int at = (8 * r + m) * C + 8 * r + n;
    const float A0 = betas[8 * r + m] * KK[at] * decay[at];  // of A only what is read, which lies below its diagonal
    const float A1 = betas[8 * r + m] * KK[at + 1] * decay[at + 1];
    inverse[r].thread_elements()[0] = m == n ? 1.0f : m == n + 1 ? -A0 : 0.0f;
    inverse[r].thread_elements()[1] = m == n + 1 ? 1.0f : 0.0f;
    for (int size = 2; size < 8; size *= 2) {
      const bool merged = m / (2 * size) == n / (2 * size) && m / size > n / size;
      L.thread_elements()[0] = merged ? -A0 : 0.0f;
      L.thread_elements()[1] = merged ? -A1 : 0.0f;
      simdgroup_multiply(product, inverse[r], L);
      simdgroup_multiply_accumulate(inverse[r], product, inverse[r], inverse[r]);
    }
  }
  const int at = (8 + m) * C + n;
  L.thread_elements()[0] = -betas[8 + m] * KK[at] * decay[at];
  L.thread_elements()[1] = -betas[8 + m] * KK[at + 1] * decay[at + 1];
  simdgroup_multiply(product, inverse[1], L);
  simdgroup_multiply(corner, product, inverse[0]);

  simdgroup_float8x8 U[2], O[2];
  #pragma clang loop unroll(full)
  for (int r = 0; r < 2; ++r) {
    simdgroup_float8x8 tile;
    simdgroup_float8x8 recalled = make_filled_simdgroup_matrix<float, 8>(0.0f);
    O[r] = make_filled_simdgroup_matrix<float, 8>(0.0f);
    #pragma clang loop unroll(full)
    for (int j = 0; j < TILES; ++j) {
      simdgroup_load(tile, K + 8 * r * PITCH + 8 * j, PITCH);
      simdgroup_multiply_accumulate(recalled, tile, S[j], recalled);
      simdgroup_load(tile, Q + 8 * r * PITCH + 8 * j, PITCH);
      simdgroup_multiply_accumulate(O[r], tile, S[j], O[r]);
    }
    const int t = 8 * r + m;
    const float from_start = alphas[0] * decay[t * C];
    for (int e = 0; e < 2; ++e) {
      const float value = t < count ? float(v_c[t * Hv * Dv + n + e]) : 0.0f;
      U[r].thread_elements()[e] = betas[t] * (value - from_start * recalled.thread_elements()[e]);
      O[r].thread_elements()[e] *= from_start;
    }
  }
  simdgroup_multiply(product, corner, U[0]);
  simdgroup_multiply_accumulate(U[1], inverse[1], U[1], product);
  simdgroup_multiply(product, inverse[0], U[0]);
  U[0] = product;

  #pragma clang loop unroll(full)
  for (int r = 0; r < 2; ++r) {
    #pragma clang loop unroll(full)
    for (int c = 0; c <= r; ++c) {
      simdgroup_float8x8 scores;
      const int t = 8 * r + m, s = 8 * c + n;
      scores.thread_elements()[0] = s <= t ? QK[t * C + s] * decay[t * C + s] : 0.0f;
      scores.thread_elements()[1] = s + 1 <= t ? QK[t * C + s + 1] * decay[t * C + s + 1] : 0.0f;
      simdgroup_multiply_accumulate(O[r], scores, U[c], O[r]);
    }
    for (int e = 0; e < 2; ++e) {
      if (8 * r + m < count) {
        o_c[(8 * r + m) * Hv * Dv + n + e] = O[r].thread_elements()[e];
      }
    }
  }

  #pragma clang loop unroll(full)
  for (int r = 0; r < 2; ++r) {
    const float to_end = decay[(C - 1) * C + 8 * r + m];
    U[r].thread_elements()[0] *= to_end;
    U[r].thread_elements()[1] *= to_end;
  }
  const float whole = alphas[0] * decay[(C - 1) * C];
  #pragma clang loop unroll(full)
  for (int j = 0; j < TILES; ++j) {
    S[j].thread_elements()[0] *= whole;
    S[j].thread_elements()[1] *= whole;
    #pragma clang loop unroll(full)
    for (int r = 0; r < 2; ++r) {
      simdgroup_float8x8 tile;
      simdgroup_load(tile, K + 8 * r * PITCH + 8 * j, PITCH, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(S[j], tile, U[r], S[j]);
    }
  }

  q_c += C * Hk * Dk;
  k_c += C * Hk * Dk;
  g_c += C * Hv;
  beta_c += C * Hv;
  v_c += C * Hv * Dv;
  o_c += C * Hv * Dv;
}

#pragma clang loop unroll(full)
for (int j = 0; j < TILES; ++j) {
  simdgroup_store(S[j], state_out + state_rows + 8 * j, Dk, ulong2(0, 0), true);
}
