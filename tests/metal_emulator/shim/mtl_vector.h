// vec<T, 2..4> with the usual swizzles, packed_vec, array, and their operators.
#pragma once
#include "mtl_limits.h"

namespace metal {
template <class T, int N>
struct vec;

template <class T, int M, int... I>
struct mtl_swizzle {
  T components[M];

  operator vec<T, (int)sizeof...(I)>() const { return vec<T, (int)sizeof...(I)>(components[I]...); }

  mtl_swizzle& operator=(vec<T, (int)sizeof...(I)> v) {
    int next = 0;
    ((components[I] = v[next++]), ...);
    return *this;
  }
};

template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    T data_[2];

    struct {
      T x, y;
    };

    struct {
      T r, g;
    };

    mtl_swizzle<T, 2, 0, 1> xy;
    mtl_swizzle<T, 2, 1, 0> yx;
    mtl_swizzle<T, 2, 0, 0> xx;
  };

  typedef T value_type;
  vec() = default;
  vec(const vec&) = default;
  vec& operator=(const vec&) = default;

  constexpr vec(T s) : data_{s, s} {}

  constexpr vec(T a, T b) : data_{a, b} {}

  template <class U>
  constexpr explicit vec(vec<U, 2> o) : data_{T(o[0]), T(o[1])} {}

  constexpr T& operator[](int i) { return data_[i]; }

  constexpr const T& operator[](int i) const { return data_[i]; }
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    T data_[3];

    struct {
      T x, y, z;
    };

    struct {
      T r, g, b;
    };

    mtl_swizzle<T, 3, 0, 1> xy;
    mtl_swizzle<T, 3, 1, 2> yz;
    mtl_swizzle<T, 3, 0, 2> xz;
    mtl_swizzle<T, 3, 0, 1, 2> xyz;
    mtl_swizzle<T, 3, 2, 1, 0> zyx;
  };

  typedef T value_type;
  vec() = default;
  vec(const vec&) = default;
  vec& operator=(const vec&) = default;

  constexpr vec(T s) : data_{s, s, s} {}

  constexpr vec(T a, T b_, T c) : data_{a, b_, c} {}

  constexpr vec(vec<T, 2> a, T c) : data_{a[0], a[1], c} {}

  constexpr vec(T a, vec<T, 2> c) : data_{a, c[0], c[1]} {}

  template <class U>
  constexpr explicit vec(vec<U, 3> o) : data_{T(o[0]), T(o[1]), T(o[2])} {}

  constexpr T& operator[](int i) { return data_[i]; }

  constexpr const T& operator[](int i) const { return data_[i]; }
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    T data_[4];

    struct {
      T x, y, z, w;
    };

    struct {
      T r, g, b, a;
    };

    mtl_swizzle<T, 4, 0, 1> xy;
    mtl_swizzle<T, 4, 2, 3> zw;
    mtl_swizzle<T, 4, 1, 2> yz;
    mtl_swizzle<T, 4, 0, 2> xz;
    mtl_swizzle<T, 4, 1, 3> yw;
    mtl_swizzle<T, 4, 0, 1, 2> xyz;
    mtl_swizzle<T, 4, 1, 2, 3> yzw;
    mtl_swizzle<T, 4, 0, 1, 2, 3> xyzw;
    mtl_swizzle<T, 4, 3, 2, 1, 0> wzyx;
  };

  typedef T value_type;
  vec() = default;
  vec(const vec&) = default;
  vec& operator=(const vec&) = default;

  constexpr vec(T s) : data_{s, s, s, s} {}

  constexpr vec(T p, T q, T c, T d) : data_{p, q, c, d} {}

  constexpr vec(vec<T, 2> p, vec<T, 2> c) : data_{p[0], p[1], c[0], c[1]} {}

  constexpr vec(vec<T, 2> p, T c, T d) : data_{p[0], p[1], c, d} {}

  constexpr vec(vec<T, 3> p, T d) : data_{p[0], p[1], p[2], d} {}

  template <class U>
  constexpr explicit vec(vec<U, 4> o) : data_{T(o[0]), T(o[1]), T(o[2]), T(o[3])} {}

  constexpr T& operator[](int i) { return data_[i]; }

  constexpr const T& operator[](int i) const { return data_[i]; }
};

template <class T>
struct mtl_is_vec : false_type {};

template <class T, int N>
struct mtl_is_vec<vec<T, N>> : true_type {};

#define MTL_VECTOR_ARITHMETIC(op, assign)                                      \
  template <class T, int N>                                                    \
  constexpr vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                  \
    vec<T, N> r{};                                                             \
    for (int i = 0; i < N; ++i) r[i] = a[i] op b[i];                           \
    return r;                                                                  \
  }                                                                            \
  template <class T, int N, class S, enable_if_t<is_arithmetic_v<S>, int> = 0> \
  constexpr vec<T, N> operator op(vec<T, N> a, S b) {                          \
    vec<T, N> r{};                                                             \
    for (int i = 0; i < N; ++i) r[i] = a[i] op T(b);                           \
    return r;                                                                  \
  }                                                                            \
  template <class T, int N, class S, enable_if_t<is_arithmetic_v<S>, int> = 0> \
  constexpr vec<T, N> operator op(S a, vec<T, N> b) {                          \
    vec<T, N> r{};                                                             \
    for (int i = 0; i < N; ++i) r[i] = T(a) op b[i];                           \
    return r;                                                                  \
  }                                                                            \
  template <class T, int N>                                                    \
  inline vec<T, N>& operator assign(vec<T, N>& a, vec<T, N> b) {               \
    a = a op b;                                                                \
    return a;                                                                  \
  }                                                                            \
  template <class T, int N, class S, enable_if_t<is_arithmetic_v<S>, int> = 0> \
  inline vec<T, N>& operator assign(vec<T, N>& a, S b) {                       \
    a = a op T(b);                                                             \
    return a;                                                                  \
  }
MTL_VECTOR_ARITHMETIC(+, +=)
MTL_VECTOR_ARITHMETIC(-, -=)
MTL_VECTOR_ARITHMETIC(*, *=)
MTL_VECTOR_ARITHMETIC(/, /=)
MTL_VECTOR_ARITHMETIC(%, %=)
MTL_VECTOR_ARITHMETIC(&, &=)
MTL_VECTOR_ARITHMETIC(|, |=)
MTL_VECTOR_ARITHMETIC(^, ^=)
MTL_VECTOR_ARITHMETIC(<<, <<=)
MTL_VECTOR_ARITHMETIC(>>, >>=)
#undef MTL_VECTOR_ARITHMETIC

#define MTL_VECTOR_COMPARISON(op)                                              \
  template <class T, int N>                                                    \
  constexpr vec<bool, N> operator op(vec<T, N> a, vec<T, N> b) {               \
    vec<bool, N> r{};                                                          \
    for (int i = 0; i < N; ++i) r[i] = a[i] op b[i];                           \
    return r;                                                                  \
  }                                                                            \
  template <class T, int N, class S, enable_if_t<is_arithmetic_v<S>, int> = 0> \
  constexpr vec<bool, N> operator op(vec<T, N> a, S b) {                       \
    vec<bool, N> r{};                                                          \
    for (int i = 0; i < N; ++i) r[i] = a[i] op T(b);                           \
    return r;                                                                  \
  }
MTL_VECTOR_COMPARISON(<)
MTL_VECTOR_COMPARISON(>)
MTL_VECTOR_COMPARISON(<=)
MTL_VECTOR_COMPARISON(>=)
MTL_VECTOR_COMPARISON(==)
MTL_VECTOR_COMPARISON(!=)
#undef MTL_VECTOR_COMPARISON

template <class T, int N>
constexpr vec<T, N> operator-(vec<T, N> a) {
  vec<T, N> r{};
  for (int i = 0; i < N; ++i) r[i] = -a[i];
  return r;
}

template <class T, int N>
constexpr vec<T, N> operator~(vec<T, N> a) {
  vec<T, N> r{};
  for (int i = 0; i < N; ++i) r[i] = ~a[i];
  return r;
}

template <int N>
constexpr vec<bool, N> operator!(vec<bool, N> a) {
  vec<bool, N> r{};
  for (int i = 0; i < N; ++i) r[i] = !a[i];
  return r;
}

template <int N>
constexpr bool all(vec<bool, N> a) {
  for (int i = 0; i < N; ++i)
    if (!a[i]) return false;
  return true;
}

template <int N>
constexpr bool any(vec<bool, N> a) {
  for (int i = 0; i < N; ++i)
    if (a[i]) return true;
  return false;
}

template <class T, int N>
constexpr T dot(vec<T, N> a, vec<T, N> b) {
  T s = a[0] * b[0];
  for (int i = 1; i < N; ++i) s = s + a[i] * b[i];
  return s;
}

template <class T, int N>
struct packed_vec {
  T d[N];
  packed_vec() = default;

  packed_vec(vec<T, N> v) {
    for (int i = 0; i < N; ++i) d[i] = v[i];
  }

  operator vec<T, N>() const {
    vec<T, N> r;
    for (int i = 0; i < N; ++i) r[i] = d[i];
    return r;
  }

  T& operator[](int i) { return d[i]; }

  const T& operator[](int i) const { return d[i]; }
};

template <class T, size_t N>
struct array {
  T d[N];

  constexpr T& operator[](size_t i) { return d[i]; }

  constexpr const T& operator[](size_t i) const { return d[i]; }

  constexpr size_t size() const { return N; }
};
}  // namespace metal

#define MTL_VECTOR_NAMES(type)                         \
  typedef metal::vec<type, 2> type##2;                 \
  typedef metal::vec<type, 3> type##3;                 \
  typedef metal::vec<type, 4> type##4;                 \
  typedef metal::packed_vec<type, 2> packed_##type##2; \
  typedef metal::packed_vec<type, 3> packed_##type##3; \
  typedef metal::packed_vec<type, 4> packed_##type##4;
MTL_VECTOR_NAMES(bool)
MTL_VECTOR_NAMES(char)
MTL_VECTOR_NAMES(uchar)
MTL_VECTOR_NAMES(short)
MTL_VECTOR_NAMES(ushort)
MTL_VECTOR_NAMES(int)
MTL_VECTOR_NAMES(uint)
MTL_VECTOR_NAMES(long)
MTL_VECTOR_NAMES(ulong)
MTL_VECTOR_NAMES(half)
MTL_VECTOR_NAMES(float)
MTL_VECTOR_NAMES(bfloat)
#undef MTL_VECTOR_NAMES
