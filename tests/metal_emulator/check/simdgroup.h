// <metal_simdgroup>, <metal_quadgroup>, <metal_simdgroup_matrix> and the barriers.
#pragma once

namespace metal {

// 64-bit and bool values have no overload in Metal; MLX's utils.h adds some shuffles of them.
#define MTL_LANE_INTEGERS(F, name)                                                      \
  MTL_WIDTHS(F, name, char) MTL_WIDTHS(F, name, uchar) MTL_WIDTHS(F, name, short)       \
  MTL_WIDTHS(F, name, ushort) MTL_WIDTHS(F, name, int) MTL_WIDTHS(F, name, uint)        \
  F(name, signed char)                                                                  \
  void name(bool) = delete;
#define MTL_LANE_NUMBERS(F, name) MTL_FLOATS(F, name) MTL_LANE_INTEGERS(F, name)
#define MTL_FROM_LANE(name, T) T name(T, ushort);
#define MTL_FILLING(name, T) \
  T name(T data, T filling, ushort delta); \
  T name(T data, T filling, ushort delta, ushort modulo);

#define MTL_REDUCTIONS(scope)                             \
  MTL_LANE_NUMBERS(MTL_UNARY, scope##_sum)                \
  MTL_LANE_NUMBERS(MTL_UNARY, scope##_product)            \
  MTL_LANE_NUMBERS(MTL_UNARY, scope##_max)                \
  MTL_LANE_NUMBERS(MTL_UNARY, scope##_min)                \
  MTL_LANE_INTEGERS(MTL_UNARY, scope##_and)               \
  MTL_LANE_INTEGERS(MTL_UNARY, scope##_or)                \
  MTL_LANE_INTEGERS(MTL_UNARY, scope##_xor)               \
  MTL_LANE_NUMBERS(MTL_UNARY, scope##_broadcast_first)    \
  MTL_LANE_NUMBERS(MTL_FROM_LANE, scope##_broadcast)      \
  MTL_LANE_NUMBERS(MTL_FROM_LANE, scope##_shuffle)        \
  MTL_LANE_NUMBERS(MTL_FROM_LANE, scope##_shuffle_xor)    \
  MTL_LANE_NUMBERS(MTL_FROM_LANE, scope##_shuffle_up)     \
  MTL_LANE_NUMBERS(MTL_FROM_LANE, scope##_shuffle_down)   \
  MTL_LANE_NUMBERS(MTL_FROM_LANE, scope##_shuffle_rotate_up)   \
  MTL_LANE_NUMBERS(MTL_FROM_LANE, scope##_shuffle_rotate_down)
MTL_REDUCTIONS(simd)
MTL_REDUCTIONS(quad)
MTL_LANE_NUMBERS(MTL_UNARY, simd_prefix_inclusive_sum)
MTL_LANE_NUMBERS(MTL_UNARY, simd_prefix_exclusive_sum)
MTL_LANE_NUMBERS(MTL_UNARY, simd_prefix_inclusive_product)
MTL_LANE_NUMBERS(MTL_UNARY, simd_prefix_exclusive_product)
MTL_LANE_NUMBERS(MTL_FILLING, simd_shuffle_and_fill_up)
MTL_LANE_NUMBERS(MTL_FILLING, simd_shuffle_and_fill_down)
#undef MTL_REDUCTIONS

struct simd_vote {
  using vote_t = ulong;
  explicit simd_vote(vote_t);
  explicit operator vote_t() const;
  bool all() const;
  bool any() const;
};
simd_vote simd_ballot(bool);
simd_vote simd_active_threads_mask();
bool simd_all(bool);
bool simd_any(bool);
bool simd_is_first();
bool simd_is_helper_thread();

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

template <class T, int Rows, int Columns = Rows>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "SIMD-group matrices are 8 x 8");
  static_assert(is_floating_point_v<T>, "SIMD-group matrices hold float, half or bfloat");
  simdgroup_matrix();
  explicit simdgroup_matrix(T diagonal);
  thread vec<T, 2>& thread_elements();
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8>;

template <class T, int Rows, int Columns = Rows>
simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T);
template <class T, int Rows, int Columns = Rows>
simdgroup_matrix<T, Rows, Columns> make_diagonal_simdgroup_matrix(T);

template <class D, class A, class B>
void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>);
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<D, 8, 8>&,
    simdgroup_matrix<A, 8, 8>,
    simdgroup_matrix<B, 8, 8>,
    simdgroup_matrix<C, 8, 8>);

#define MTL_MATRIX_MEMORY(space)                                                                                       \
  template <class T>                                                                                                   \
  void simdgroup_load(                                                                                                 \
      thread simdgroup_matrix<T, 8, 8>&, const space T*, ulong per_row = 8, ulong2 origin = 0, bool transpose = false); \
  template <class T>                                                                                                   \
  void simdgroup_store(                                                                                                \
      simdgroup_matrix<T, 8, 8>, space T*, ulong per_row = 8, ulong2 origin = 0, bool transpose = false);
MTL_MATRIX_MEMORY(device)
MTL_MATRIX_MEMORY(threadgroup)
#undef MTL_MATRIX_MEMORY

} // namespace metal
