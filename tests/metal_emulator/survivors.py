"""Mutants of the Metal kernels that no test can notice, as nothing that is seen depends on the change; with its reason.

By kernel and by the line as it reads after the change.
"""

SAME_SUM = (
    "After the exchange with the neighbour both lanes of a pair hold its sum, so either lane of the other pair will do."
)
SAME_LANE = "All four lanes of a row hold the sum; which of them writes it does not matter."
LARGER_ARRAY = "A larger array than needed, of which the rest is not touched."
NOT_WRITTEN = (
    "Channels beyond the last are computed along and never written; they belong to no head that is normalized."
)
NO_ELEMENT = "One turn more, in which every thread stands beyond the row and does nothing."
NO_TOKEN = (
    "A token beyond the last: its beta of 0 alone already makes all that it would write 0, and its output is not kept."
)

SURVIVORS: dict[tuple[str, str], str] = {
    ("causal_conv1d", "taps[i][j] = channel < Cn ? float(weight[channel * K + j]) : 1.0f;"): NOT_WRITTEN,
    ("causal_conv1d", "window[i][j] = channel >= Cn ? 1.0f"): NOT_WRITTEN,
    (
        "causal_conv1d",
        "window[i][K - 1] = channel < Cn ? float(columns[size_t(t) * Cn + channel]) : 1.0f;",
    ): NOT_WRITTEN,
    (
        "causal_conv1d",
        ": t < 1                  ? float(before[(t + K - 1) * Cn + channel])",
    ): "A block begins at a multiple of 8 and its window K - 1 tokens before: token 0 is in none, as K is at most 8.",
    (
        "causal_conv1d",
        ": t <= 0                  ? float(before[(t + K - 1) * Cn + channel])",
    ): "A block begins at a multiple of 8 and its window K - 1 tokens before: token 0 is in none, as K is at most 8.",
    ("gated_delta_step", "recalled += simd_shuffle_xor(recalled, 3);"): SAME_SUM,
    ("gated_delta_step", "read += simd_shuffle_xor(read, 3);"): SAME_SUM,
    ("gated_delta_step", "if (part == 1) {"): SAME_LANE,
    ("gated_delta_step", "threadgroup float mixed[3 * Dk + Dv];"): LARGER_ARRAY,
    ("gated_delta_scan", "recalled += simd_shuffle_xor(recalled, 3);"): SAME_SUM,
    ("gated_delta_scan", "read += simd_shuffle_xor(read, 3);"): SAME_SUM,
    ("gated_delta_scan", "if (part == 1) {"): SAME_LANE,
    ("gated_delta_chunk", "constexpr int PITCH = Dk + 5;"): "The pitch decides on speed alone.",
    ("gated_delta_chunk", "for (int start = 0; start <= T; start += C) {"): "One chunk more, of no tokens: it changes "
    "and writes nothing.",
    ("gated_delta_chunk", "K[t * PITCH + d] = t < count ? float(k_c[t * Hk * Dk + d]) : 1.0f;"): NO_TOKEN,
    ("gated_delta_chunk", "Q[t * PITCH + d] = t < count ? float(q_c[t * Hk * Dk + d]) : 1.0f;"): NO_TOKEN,
    (
        "gated_delta_chunk",
        "betas[t] = t < count ? float(beta_c[t * Hv]) : 1.0f;",
    ): "A token beyond the last: its key and value of 0 alone already make all that it would write 0.",
    ("gated_delta_chunk", "const float value = t < count ? float(v_c[t * Hv * Dv + n + e]) : 1.0f;"): NO_TOKEN,
    (
        "gated_delta_chunk",
        "const int tile_row = job % 4 > 0 ? 8 : 0, tile_column = job % 3 > 1 ? 8 : 0;",
    ): "Jobs 3 and 4 change places; the six tiles are made all the same.",
    (
        "gated_delta_chunk",
        "simdgroup_float8x8 inverse[3], corner, product, L;",
    ): LARGER_ARRAY,
    ("gated_delta_chunk", "simdgroup_float8x8 U[3], O[2];"): LARGER_ARRAY,
    ("gated_delta_chunk", "simdgroup_float8x8 U[2], O[3];"): LARGER_ARRAY,
    (
        "gated_delta_chunk",
        "for (int size = 2; size <= 8; size *= 2) {",
    ): "Blocks of 8 fill the tile; at their level there is nothing to merge, and L is 0.",
    (
        "gated_delta_chunk",
        "for (int size = 2; size < 9; size *= 2) {",
    ): "Blocks of 8 fill the tile; at their level there is nothing to merge, and L is 0.",
    (
        "qk_norm_rope",
        "const int kv_head = (head + Hq) % Hkv;",
    ): "SIMD-groups of keys change places among themselves, and those of values; every head is made all the same.",
    ("add_rms_norm", "if (thread_index_in_simdgroup == 1) {"): "All lanes of a SIMD-group hold its sum.",
    ("add_rms_norm", "constexpr int ELEMENTS = (D + THREADS + 1) / THREADS;"): NO_ELEMENT,
    ("add_rms_norm", "for (int i = 0; i <= ELEMENTS; ++i) {"): NO_ELEMENT,
    (
        "gated_delta_chunk",
        "const bool merged = m / (2 * size) == n / (2 + size) && m / size > n / size;",
    ): "For size 2 it is the same; for size 4 the second condition leaves only n below 4, and both quotients are 0.",
}
