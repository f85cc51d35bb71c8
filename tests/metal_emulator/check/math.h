// <metal_math>, <metal_common>, <metal_integer>, <metal_relational>, <metal_geometric>.
//
// Overloads, not templates, as in Metal: `max(0, x)` on a float x is ambiguous there and must be here, and a
// scalar beside a vector is splatted. No overload takes bfloat: MLX's bf16_math.h adds those.
#pragma once

#define MTL_FLOATS(F, name) \
  F(name, float) F(name, float2) F(name, float3) F(name, float4) F(name, half) F(name, half2) F(name, half3) F(name, half4)
#define MTL_WIDTHS(F, name, T) F(name, T) F(name, T##2) F(name, T##3) F(name, T##4)
#define MTL_INTEGERS(F, name)                                                               \
  MTL_WIDTHS(F, name, char) MTL_WIDTHS(F, name, uchar) MTL_WIDTHS(F, name, short)           \
  MTL_WIDTHS(F, name, ushort) MTL_WIDTHS(F, name, int) MTL_WIDTHS(F, name, uint)            \
  MTL_WIDTHS(F, name, long) MTL_WIDTHS(F, name, ulong) F(name, signed char)

#define MTL_UNARY(name, T) T name(T);
#define MTL_BINARY(name, T) T name(T, T);
#define MTL_TERNARY(name, T) T name(T, T, T);
#define MTL_WITH_EXPONENT(name, T) T name(T, metal::as_ints<T>);
#define MTL_SPLITTING(name, T) T name(T, thread T&);
#define MTL_TO_BOOL(name, T) metal::as_bools<T> name(T);
#define MTL_PREDICATE(name, T) bool name(T);
#define MTL_TO_SCALAR(name, T) metal::scalar_of<T> name(T);
#define MTL_PAIR_TO_SCALAR(name, T) metal::scalar_of<T> name(T, T);

namespace metal {

template <class T>
struct vector_parts {
  using scalar = T;
  using bools = bool;
  using ints = int;
};
template <class T, int N>
struct vector_parts<T __attribute__((ext_vector_type(N)))> {
  using scalar = T;
  using bools = vec<bool, N>;
  using ints = vec<int, N>;
};
template <class T>
using scalar_of = typename vector_parts<T>::scalar;
template <class T>
using as_bools = typename vector_parts<T>::bools;
template <class T>
using as_ints = typename vector_parts<T>::ints;

// The three namespaces differ in accuracy only.
#define MTL_MATH                                                                                              \
  MTL_FLOATS(MTL_UNARY, acos) MTL_FLOATS(MTL_UNARY, acosh) MTL_FLOATS(MTL_UNARY, asin)                        \
  MTL_FLOATS(MTL_UNARY, asinh) MTL_FLOATS(MTL_UNARY, atan) MTL_FLOATS(MTL_UNARY, atanh)                       \
  MTL_FLOATS(MTL_UNARY, ceil) MTL_FLOATS(MTL_UNARY, cos) MTL_FLOATS(MTL_UNARY, cosh)                          \
  MTL_FLOATS(MTL_UNARY, cospi) MTL_FLOATS(MTL_UNARY, exp) MTL_FLOATS(MTL_UNARY, exp10)                        \
  MTL_FLOATS(MTL_UNARY, exp2) MTL_FLOATS(MTL_UNARY, fabs) MTL_FLOATS(MTL_UNARY, floor)                        \
  MTL_FLOATS(MTL_UNARY, fract) MTL_FLOATS(MTL_UNARY, log) MTL_FLOATS(MTL_UNARY, log10)                        \
  MTL_FLOATS(MTL_UNARY, log2) MTL_FLOATS(MTL_UNARY, rint) MTL_FLOATS(MTL_UNARY, round)                        \
  MTL_FLOATS(MTL_UNARY, rsqrt) MTL_FLOATS(MTL_UNARY, saturate) MTL_FLOATS(MTL_UNARY, sign)                    \
  MTL_FLOATS(MTL_UNARY, sin) MTL_FLOATS(MTL_UNARY, sinh) MTL_FLOATS(MTL_UNARY, sinpi)                         \
  MTL_FLOATS(MTL_UNARY, sqrt) MTL_FLOATS(MTL_UNARY, tan) MTL_FLOATS(MTL_UNARY, tanh)                          \
  MTL_FLOATS(MTL_UNARY, tanpi) MTL_FLOATS(MTL_UNARY, trunc)                                                   \
  MTL_FLOATS(MTL_BINARY, atan2) MTL_FLOATS(MTL_BINARY, copysign) MTL_FLOATS(MTL_BINARY, divide)               \
  MTL_FLOATS(MTL_BINARY, fdim) MTL_FLOATS(MTL_BINARY, fmax) MTL_FLOATS(MTL_BINARY, fmin)                      \
  MTL_FLOATS(MTL_BINARY, fmod) MTL_FLOATS(MTL_BINARY, nextafter) MTL_FLOATS(MTL_BINARY, pow)                  \
  MTL_FLOATS(MTL_BINARY, powr) MTL_FLOATS(MTL_BINARY, step)                                                   \
  MTL_FLOATS(MTL_TERNARY, fma) MTL_FLOATS(MTL_TERNARY, mix) MTL_FLOATS(MTL_TERNARY, smoothstep)               \
  MTL_FLOATS(MTL_TERNARY, fmax3) MTL_FLOATS(MTL_TERNARY, fmin3) MTL_FLOATS(MTL_TERNARY, fmedian3)             \
  MTL_FLOATS(MTL_WITH_EXPONENT, ldexp) MTL_FLOATS(MTL_SPLITTING, modf) MTL_FLOATS(MTL_SPLITTING, sincos)      \
  MTL_FLOATS(MTL_TO_BOOL, isfinite) MTL_FLOATS(MTL_TO_BOOL, isinf) MTL_FLOATS(MTL_TO_BOOL, isnan)             \
  MTL_FLOATS(MTL_TO_BOOL, isnormal) MTL_FLOATS(MTL_TO_BOOL, signbit)                                          \
  MTL_FLOATS(MTL_UNARY, abs) MTL_FLOATS(MTL_BINARY, max) MTL_FLOATS(MTL_BINARY, min)                          \
  MTL_FLOATS(MTL_TERNARY, clamp) MTL_FLOATS(MTL_TERNARY, max3) MTL_FLOATS(MTL_TERNARY, median3)               \
  MTL_FLOATS(MTL_TERNARY, min3)                                                                               \
  float frexp(float, thread int&);                                                                            \
  half frexp(half, thread int&);

MTL_MATH
namespace fast {
MTL_MATH
}
namespace precise {
MTL_MATH
}

MTL_INTEGERS(MTL_UNARY, abs)
MTL_INTEGERS(MTL_BINARY, max)
MTL_INTEGERS(MTL_BINARY, min)
MTL_INTEGERS(MTL_TERNARY, clamp)
MTL_INTEGERS(MTL_TERNARY, max3)
MTL_INTEGERS(MTL_TERNARY, median3)
MTL_INTEGERS(MTL_TERNARY, min3)
MTL_INTEGERS(MTL_UNARY, clz)
MTL_INTEGERS(MTL_UNARY, ctz)
MTL_INTEGERS(MTL_UNARY, popcount)
MTL_INTEGERS(MTL_UNARY, reverse_bits)
MTL_INTEGERS(MTL_BINARY, absdiff)
MTL_INTEGERS(MTL_BINARY, addsat)
MTL_INTEGERS(MTL_BINARY, subsat)
MTL_INTEGERS(MTL_BINARY, hadd)
MTL_INTEGERS(MTL_BINARY, mulhi)
MTL_INTEGERS(MTL_BINARY, rotate)
MTL_INTEGERS(MTL_TERNARY, mad24)
template <class T>
T extract_bits(T, uint offset, uint bits);
template <class T>
T insert_bits(T base, T insert, uint offset, uint bits);

MTL_FLOATS(MTL_PAIR_TO_SCALAR, dot)
MTL_FLOATS(MTL_PAIR_TO_SCALAR, distance)
MTL_FLOATS(MTL_TO_SCALAR, length)
MTL_FLOATS(MTL_TO_SCALAR, length_squared)
MTL_FLOATS(MTL_UNARY, normalize)
float3 cross(float3, float3);
half3 cross(half3, half3);

// A comparison of clang's vectors gives integers where Metal's gives bools: any condition is taken.
template <class T, class B>
T select(T if_false, T if_true, B condition);
template <class B>
bool all(B conditions);
template <class B>
bool any(B conditions);

} // namespace metal

// What MLX's bf16_math.h calls underneath; the value's type goes in and comes out.
#define MTL_INTERNAL(name)                  \
  template <class T, class... Rest>         \
  T __metal_##name(T value, Rest... rest);
MTL_INTERNAL(acos) MTL_INTERNAL(acosh) MTL_INTERNAL(asin) MTL_INTERNAL(asinh) MTL_INTERNAL(atan) MTL_INTERNAL(atan2)
MTL_INTERNAL(atanh) MTL_INTERNAL(ceil) MTL_INTERNAL(cos) MTL_INTERNAL(cosh) MTL_INTERNAL(cospi) MTL_INTERNAL(divide)
MTL_INTERNAL(exp) MTL_INTERNAL(exp10) MTL_INTERNAL(exp2) MTL_INTERNAL(fabs) MTL_INTERNAL(floor) MTL_INTERNAL(fma)
MTL_INTERNAL(fmax) MTL_INTERNAL(fmax3) MTL_INTERNAL(fmedian3) MTL_INTERNAL(fmin) MTL_INTERNAL(fmin3)
MTL_INTERNAL(fmod) MTL_INTERNAL(fract) MTL_INTERNAL(frexp) MTL_INTERNAL(ldexp) MTL_INTERNAL(log) MTL_INTERNAL(log10)
MTL_INTERNAL(log2) MTL_INTERNAL(nextafter) MTL_INTERNAL(pow) MTL_INTERNAL(powr) MTL_INTERNAL(rint)
MTL_INTERNAL(round) MTL_INTERNAL(rsqrt) MTL_INTERNAL(sin) MTL_INTERNAL(sinh) MTL_INTERNAL(sinpi) MTL_INTERNAL(sqrt)
MTL_INTERNAL(tan) MTL_INTERNAL(tanh) MTL_INTERNAL(tanpi) MTL_INTERNAL(trunc)
MTL_INTERNAL(get_simdgroup_size) MTL_INTERNAL(simd_broadcast) MTL_INTERNAL(simd_max) MTL_INTERNAL(simd_min)
MTL_INTERNAL(simd_prefix_exclusive_product) MTL_INTERNAL(simd_prefix_exclusive_sum)
MTL_INTERNAL(simd_prefix_inclusive_product) MTL_INTERNAL(simd_prefix_inclusive_sum) MTL_INTERNAL(simd_product)
MTL_INTERNAL(simd_shuffle) MTL_INTERNAL(simd_shuffle_and_fill_down) MTL_INTERNAL(simd_shuffle_and_fill_up)
MTL_INTERNAL(simd_shuffle_down) MTL_INTERNAL(simd_shuffle_rotate_down) MTL_INTERNAL(simd_shuffle_rotate_up)
MTL_INTERNAL(simd_shuffle_up) MTL_INTERNAL(simd_shuffle_xor) MTL_INTERNAL(simd_sum) MTL_INTERNAL(simd_xor)
#undef MTL_INTERNAL
