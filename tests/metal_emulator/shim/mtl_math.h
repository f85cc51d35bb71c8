// <metal_math>, <metal_integer>, <metal_common>: float by libm, half through float, vectors by component.
#pragma once
#include "mtl_vector.h"

// With its suffix: the compiler is told to read a plain 3.14 as a float.
constexpr double mtl_pi = (double)3.14159265358979323846L;

// __metal_* builtins (what MLX's bf16_math.h calls): float in, float out; the second argument is the fast-math flag
#define MTL_UNARY_BUILTIN(name, expr) \
  inline float __metal_##name(float x, bool = false) { return expr; }
MTL_UNARY_BUILTIN(fabs, __builtin_fabsf(x))
MTL_UNARY_BUILTIN(acos, __builtin_acosf(x))
MTL_UNARY_BUILTIN(acosh, __builtin_acoshf(x))
MTL_UNARY_BUILTIN(asin, __builtin_asinf(x))
MTL_UNARY_BUILTIN(asinh, __builtin_asinhf(x))
MTL_UNARY_BUILTIN(atan, __builtin_atanf(x))
MTL_UNARY_BUILTIN(atanh, __builtin_atanhf(x))
MTL_UNARY_BUILTIN(ceil, __builtin_ceilf(x))
MTL_UNARY_BUILTIN(cos, __builtin_cosf(x))
MTL_UNARY_BUILTIN(cosh, __builtin_coshf(x))
MTL_UNARY_BUILTIN(cospi, (float)__builtin_cos(mtl_pi* x))
MTL_UNARY_BUILTIN(exp, __builtin_expf(x))
MTL_UNARY_BUILTIN(exp10, (float)__builtin_pow(10.0, x))
MTL_UNARY_BUILTIN(exp2, __builtin_exp2f(x))
MTL_UNARY_BUILTIN(floor, __builtin_floorf(x))
MTL_UNARY_BUILTIN(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
MTL_UNARY_BUILTIN(log, __builtin_logf(x))
MTL_UNARY_BUILTIN(log10, __builtin_log10f(x))
MTL_UNARY_BUILTIN(log2, __builtin_log2f(x))
MTL_UNARY_BUILTIN(rint, __builtin_rintf(x))
MTL_UNARY_BUILTIN(round, __builtin_roundf(x))
MTL_UNARY_BUILTIN(rsqrt, 1.0f / __builtin_sqrtf(x))
MTL_UNARY_BUILTIN(sin, __builtin_sinf(x))
MTL_UNARY_BUILTIN(sinh, __builtin_sinhf(x))
MTL_UNARY_BUILTIN(sinpi, (float)__builtin_sin(mtl_pi* x))
MTL_UNARY_BUILTIN(sqrt, __builtin_sqrtf(x))
MTL_UNARY_BUILTIN(tan, __builtin_tanf(x))
MTL_UNARY_BUILTIN(tanh, __builtin_tanhf(x))
MTL_UNARY_BUILTIN(tanpi, (float)__builtin_tan(mtl_pi* x))
MTL_UNARY_BUILTIN(trunc, __builtin_truncf(x))
#undef MTL_UNARY_BUILTIN
#define MTL_BINARY_BUILTIN(name, expr) \
  inline float __metal_##name(float x, float y, bool = false) { return expr; }
MTL_BINARY_BUILTIN(atan2, __builtin_atan2f(x, y))
MTL_BINARY_BUILTIN(divide, x / y)
MTL_BINARY_BUILTIN(fmax, __builtin_fmaxf(x, y))
MTL_BINARY_BUILTIN(fmin, __builtin_fminf(x, y))
MTL_BINARY_BUILTIN(fmod, __builtin_fmodf(x, y))
MTL_BINARY_BUILTIN(nextafter, __builtin_nextafterf(x, y))
MTL_BINARY_BUILTIN(pow, __builtin_powf(x, y))
MTL_BINARY_BUILTIN(powr, __builtin_powf(x, y))
#undef MTL_BINARY_BUILTIN

inline float __metal_fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }

inline float __metal_fmax3(float x, float y, float z, bool = false) {
  return __builtin_fmaxf(x, __builtin_fmaxf(y, z));
}

inline float __metal_fmin3(float x, float y, float z, bool = false) {
  return __builtin_fminf(x, __builtin_fminf(y, z));
}

inline float __metal_fmedian3(float x, float y, float z, bool = false) {
  return __builtin_fmaxf(__builtin_fminf(x, y), __builtin_fminf(__builtin_fmaxf(x, y), z));
}

inline float __metal_frexp(float x, int* e) { return __builtin_frexpf(x, e); }

inline float __metal_ldexp(float x, int k, bool = false) { return __builtin_ldexpf(x, k); }

#define MTL_UNARY(name)                                                                      \
  inline float name(float x) { return __metal_##name(x); }                                   \
  inline half name(half x) { return (half)__metal_##name((float)x); }                        \
  template <class T, int N, enable_if_t<is_same_v<T, float> || is_same_v<T, half>, int> = 0> \
  inline vec<T, N> name(vec<T, N> x) {                                                       \
    vec<T, N> r;                                                                             \
    for (int i = 0; i < N; ++i) r[i] = name(x[i]);                                           \
    return r;                                                                                \
  }
#define MTL_BINARY(name)                                                                     \
  inline float name(float x, float y) { return __metal_##name(x, y); }                       \
  inline half name(half x, half y) { return (half)__metal_##name((float)x, (float)y); }      \
  template <class T, int N, enable_if_t<is_same_v<T, float> || is_same_v<T, half>, int> = 0> \
  inline vec<T, N> name(vec<T, N> x, vec<T, N> y) {                                          \
    vec<T, N> r;                                                                             \
    for (int i = 0; i < N; ++i) r[i] = name(x[i], y[i]);                                     \
    return r;                                                                                \
  }
#define MTL_MATH_FUNCTIONS \
  MTL_UNARY(fabs)          \
  MTL_UNARY(acos)          \
  MTL_UNARY(acosh)         \
  MTL_UNARY(asin)          \
  MTL_UNARY(asinh)         \
  MTL_UNARY(atan)          \
  MTL_UNARY(atanh)         \
  MTL_UNARY(ceil)          \
  MTL_UNARY(cos)           \
  MTL_UNARY(cosh)          \
  MTL_UNARY(cospi)         \
  MTL_UNARY(exp)           \
  MTL_UNARY(exp10)         \
  MTL_UNARY(exp2)          \
  MTL_UNARY(floor)         \
  MTL_UNARY(fract)         \
  MTL_UNARY(log)           \
  MTL_UNARY(log10)         \
  MTL_UNARY(log2)          \
  MTL_UNARY(rint)          \
  MTL_UNARY(round)         \
  MTL_UNARY(rsqrt)         \
  MTL_UNARY(sin)           \
  MTL_UNARY(sinh)          \
  MTL_UNARY(sinpi)         \
  MTL_UNARY(sqrt)          \
  MTL_UNARY(tan)           \
  MTL_UNARY(tanh)          \
  MTL_UNARY(tanpi)         \
  MTL_UNARY(trunc)         \
  MTL_BINARY(atan2)        \
  MTL_BINARY(divide)       \
  MTL_BINARY(fmax)         \
  MTL_BINARY(fmin)         \
  MTL_BINARY(fmod)         \
  MTL_BINARY(pow)          \
  MTL_BINARY(powr)

namespace metal {
MTL_MATH_FUNCTIONS

namespace fast {
MTL_MATH_FUNCTIONS
}

namespace precise {
MTL_MATH_FUNCTIONS
}

inline float abs(float x) { return __builtin_fabsf(x); }

inline half abs(half x) { return (half)__builtin_fabsf((float)x); }

template <class T, enable_if_t<is_integral_v<T>, int> = 0>
inline T abs(T x) {
  return x < 0 ? T(-x) : x;
}

template <class T, int N>
inline vec<T, N> abs(vec<T, N> x) {
  vec<T, N> r;
  for (int i = 0; i < N; ++i) r[i] = abs(x[i]);
  return r;
}

#define MTL_EXTREMUM(name, builtin, op)                                          \
  inline float name(float a, float b) { return builtin(a, b); }                  \
  inline half name(half a, half b) { return (half)builtin((float)a, (float)b); } \
  template <class T, enable_if_t<is_integral_v<T>, int> = 0>                     \
  constexpr T name(T a, T b) {                                                   \
    return a op b ? a : b;                                                       \
  }                                                                              \
  template <class T, int N>                                                      \
  inline vec<T, N> name(vec<T, N> a, vec<T, N> b) {                              \
    vec<T, N> r;                                                                 \
    for (int i = 0; i < N; ++i) r[i] = name(a[i], b[i]);                         \
    return r;                                                                    \
  }                                                                              \
  namespace fast {                                                               \
  inline float name(float a, float b) { return builtin(a, b); }                  \
  inline half name(half a, half b) { return (half)builtin((float)a, (float)b); } \
  }                                                                              \
  namespace precise {                                                            \
  inline float name(float a, float b) { return builtin(a, b); }                  \
  inline half name(half a, half b) { return (half)builtin((float)a, (float)b); } \
  }
MTL_EXTREMUM(max, __builtin_fmaxf, >)
MTL_EXTREMUM(min, __builtin_fminf, <)
#undef MTL_EXTREMUM

template <class T>
inline T max3(T a, T b, T c) {
  return max(a, max(b, c));
}

template <class T>
inline T min3(T a, T b, T c) {
  return min(a, min(b, c));
}

template <class T>
inline T clamp(T x, T lo, T hi) {
  return min(max(x, lo), hi);
}

inline float saturate(float x) { return __builtin_fminf(__builtin_fmaxf(x, 0.f), 1.f); }

inline half saturate(half x) { return (half)saturate((float)x); }

inline float mix(float x, float y, float a) { return x + (y - x) * a; }

inline half mix(half x, half y, half a) { return x + (y - x) * a; }

inline float step(float e, float x) { return x < e ? 0.f : 1.f; }

inline float sign(float x) { return x > 0 ? 1.f : x < 0 ? -1.f : x == 0 ? x : 0.f; }

inline half sign(half x) { return (half)sign((float)x); }

inline float copysign(float x, float y) { return __builtin_copysignf(x, y); }

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

inline half fma(half a, half b, half c) { return (half)__builtin_fma((double)a, (double)b, (double)c); }

template <int N>
inline vec<float, N> fma(vec<float, N> a, vec<float, N> b, vec<float, N> c) {
  vec<float, N> r;
  for (int i = 0; i < N; ++i) r[i] = fma(a[i], b[i], c[i]);
  return r;
}

inline float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }

inline half ldexp(half x, int k) { return (half)__builtin_ldexpf((float)x, k); }

inline float frexp(float x, int& e) { return __builtin_frexpf(x, &e); }

inline float modf(float x, float& ip) {
  ip = __builtin_truncf(x);
  return x - ip;
}

inline float nextafter(float a, float b) { return __builtin_nextafterf(a, b); }

inline bool isnan(float x) { return __builtin_isnan(x); }

inline bool isnan(half x) { return __builtin_isnan((float)x); }

inline bool isnan(bfloat x) { return __builtin_isnan((float)x); }

inline bool isinf(float x) { return __builtin_isinf(x); }

inline bool isinf(half x) { return __builtin_isinf((float)x); }

inline bool isinf(bfloat x) { return __builtin_isinf((float)x); }

inline bool isfinite(float x) { return __builtin_isfinite(x); }

inline bool isfinite(half x) { return __builtin_isfinite((float)x); }

inline bool isfinite(bfloat x) { return __builtin_isfinite((float)x); }

inline bool signbit(float x) { return __builtin_signbit(x); }

template <class T>
inline T select(T a, T b, bool c) {
  return c ? b : a;
}

template <class T, int N>
inline vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; ++i) r[i] = c[i] ? b[i] : a[i];
  return r;
}

template <class T, enable_if_t<is_integral_v<T>, int> = 0>
inline T popcount(T x) {
  return (T)__builtin_popcountll((unsigned long long)(make_unsigned_t<T>)x);
}

template <class T, enable_if_t<is_integral_v<T>, int> = 0>
inline T clz(T x) {
  return x == 0 ? T(sizeof(T) * 8)
                : T(__builtin_clzll((unsigned long long)(make_unsigned_t<T>)x) - (64 - sizeof(T) * 8));
}

template <class T, enable_if_t<is_integral_v<T>, int> = 0>
inline T ctz(T x) {
  return x == 0 ? T(sizeof(T) * 8) : T(__builtin_ctzll((unsigned long long)(make_unsigned_t<T>)x));
}

inline uint mulhi(uint a, uint b) { return (uint)(((unsigned long long)a * b) >> 32); }

inline int mulhi(int a, int b) { return (int)(((long long)a * b) >> 32); }

template <class T>
inline T extract_bits(T x, uint o, uint n) {
  return n == 0 ? T(0) : T((x >> o) & (n >= 32 ? ~T(0) : ((T(1) << n) - 1)));
}

inline uint reverse_bits(uint x) {
  uint r = 0;
  for (int i = 0; i < 32; ++i) r |= ((x >> i) & 1u) << (31 - i);
  return r;
}

inline uint rotate(uint x, uint n) {
  n &= 31;
  return n ? (x << n) | (x >> (32 - n)) : x;
}

template <class T>
inline T absdiff(T a, T b) {
  return a > b ? a - b : b - a;
}
}  // namespace metal
