// simdgroup_matrix 8x8: two elements a lane, products accumulated in float, in ascending order, by fused multiply-add.
#pragma once
#include "mtl_simdgroup.h"

namespace metal {
namespace mtl_detail {

// Lane `lane` holds the elements (row, column) and (row, column + 1): the layout that MLX's kernels rely on.
struct Fragment {
  int row, column;
};

MTL_NOSAN constexpr Fragment fragment_of(int lane) {
  const int quad = lane / 4;
  return {(quad & 4) + lane / 2 % 4, (quad & 2) * 2 + lane % 2 * 2};
}

}  // namespace mtl_detail

template <class T, int rows, int columns = rows>
struct simdgroup_matrix {
  static_assert(rows == 8 && columns == 8, "only 8x8 simdgroup matrices exist");
  vec<T, 2> elements;

  simdgroup_matrix() = default;

  explicit simdgroup_matrix(T diagonal) {
    const mtl_detail::Fragment at = mtl_detail::fragment_of(mtl_lane_index());
    elements[0] = at.row == at.column ? diagonal : T(0);
    elements[1] = at.row == at.column + 1 ? diagonal : T(0);
  }

  vec<T, 2>& thread_elements() { return elements; }

  const vec<T, 2>& thread_elements() const { return elements; }
};

typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int rows, int columns = rows>
inline simdgroup_matrix<T, rows, columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, rows, columns> matrix;
  matrix.elements = vec<T, 2>(value, value);
  return matrix;
}

template <class T, int rows, int columns = rows>
inline simdgroup_matrix<T, rows, columns> make_diagonal_simdgroup_matrix(T value) {
  return simdgroup_matrix<T, rows, columns>(value);
}

namespace mtl_detail {

constexpr unsigned all_lanes = 0xffffffffu;

template <class A, class B, class C>
struct Factors {
  vec<A, 2> a;
  vec<B, 2> b;
  vec<C, 2> c;
};

template <class D, class A, class B, class C, bool accumulate>
MTL_NOSAN void multiply(mtl_lane* lanes, unsigned active, int line) {
  if (active != all_lanes) mtl_bad_lane(line, "simdgroup_matrix operation with fewer than 32 active lanes");
  float a[8][8] = {}, b[8][8] = {}, c[8][8] = {};
  for (int lane = 0; lane < simd_width; ++lane) {
    if (!is_active(active, lane)) continue;
    const Fragment at = fragment_of(lane);
    const auto& factors = input<Factors<A, B, C>>(lanes[lane]);
    for (int i = 0; i < 2; ++i) {
      a[at.row][at.column + i] = (float)factors.a[i];
      b[at.row][at.column + i] = (float)factors.b[i];
      if (accumulate) c[at.row][at.column + i] = (float)factors.c[i];
    }
  }
  for (int lane = 0; lane < simd_width; ++lane) {
    if (!is_active(active, lane)) continue;
    const Fragment at = fragment_of(lane);
    for (int i = 0; i < 2; ++i) {
      float sum = c[at.row][at.column + i];
      for (int k = 0; k < 8; ++k) sum = __builtin_fmaf(a[at.row][k], b[k][at.column + i], sum);
      output<vec<D, 2>>(lanes[lane])[i] = D(sum);
    }
  }
}

MTL_NOSAN inline void check_uniform_pointer(mtl_lane* lanes, unsigned active, int line) {
  const int first = __builtin_ctz(active);
  bool uniform = true;
  for (int lane = 0; lane < simd_width; ++lane)
    if (is_active(active, lane) && input<const void*>(lanes[lane]) != input<const void*>(lanes[first])) uniform = false;
  if (!uniform)
    mtl_non_uniform(line, "simdgroup_load/store: the pointer differs between lanes");
  else if (active != all_lanes)
    mtl_bad_lane(line, "simdgroup_load/store with fewer than 32 active lanes");
}

inline void meet_at(const void* pointer, int line) {
  mtl_simd_operation(MTL_OP_MATRIX_MEMORY, line, &check_uniform_pointer, mtl_lane{&pointer, nullptr, 0, 0});
}

// Where element `i` of this lane's fragment lies.
inline ulong offset_of(int i, ulong elements_per_row, ulong2 origin, bool transpose) {
  const Fragment at = fragment_of(mtl_lane_index());
  const ulong row = transpose ? at.column + i : at.row, column = transpose ? at.row : at.column + i;
  return (origin[1] + row) * elements_per_row + origin[0] + column;
}

}  // namespace mtl_detail

template <class D, class A, class B, class C>
MTL_NOSAN inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                                    simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c,
                                                    MTL_LINE) {
  mtl_detail::Factors<A, B, C> factors{a.elements, b.elements, c.elements};
  vec<D, 2> result;
  mtl_simd_operation(MTL_OP_MATRIX_MULTIPLY, mtl_line_, &mtl_detail::multiply<D, A, B, C, true>,
                     mtl_lane{&factors, &result, 0, 0});
  d.elements = result;
}

template <class D, class A, class B>
MTL_NOSAN inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                         simdgroup_matrix<B, 8, 8> b, MTL_LINE) {
  mtl_detail::Factors<A, B, D> factors{a.elements, b.elements, d.elements};
  vec<D, 2> result;
  mtl_simd_operation(MTL_OP_MATRIX_MULTIPLY, mtl_line_, &mtl_detail::multiply<D, A, B, D, false>,
                     mtl_lane{&factors, &result, 0, 0});
  d.elements = result;
}

template <class T>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& matrix, const T* source, ulong elements_per_row = 8,
                           ulong2 origin = ulong2(0, 0), bool transpose = false, MTL_LINE) {
  mtl_detail::meet_at(source, mtl_line_);
  for (int i = 0; i < 2; ++i)
    matrix.elements[i] = source[mtl_detail::offset_of(i, elements_per_row, origin, transpose)];
}

template <class T>
inline void simdgroup_store(simdgroup_matrix<T, 8, 8> matrix, T* destination, ulong elements_per_row = 8,
                            ulong2 origin = ulong2(0, 0), bool transpose = false, MTL_LINE) {
  mtl_detail::meet_at(destination, mtl_line_);
  for (int i = 0; i < 2; ++i)
    destination[mtl_detail::offset_of(i, elements_per_row, origin, transpose)] = matrix.elements[i];
}

}  // namespace metal
