// Replaces MLX's complex.h in the emulator: the original overloads constructors on address spaces.
#pragma once
#include <metal_stdlib>
using namespace metal;
template <typename T>
struct complex_t;
template <typename T>
static constexpr bool is_complex_v = false;
template <typename T>
static constexpr bool is_complex_v<complex_t<T>> = true;

template <typename T>
struct complex_t {
  typedef T value_type;
  T real, imag;
  constexpr complex_t() = default;

  constexpr complex_t(T r, T i) : real(r), imag(i) {}

  template <typename U, typename = enable_if_t<is_arithmetic_v<U>>>
  constexpr complex_t(U r) : real(T(r)), imag(T(0)) {}
};

template <typename T>
constexpr complex_t<T> operator+(complex_t<T> a, complex_t<T> b) {
  return {a.real + b.real, a.imag + b.imag};
}

template <typename T>
constexpr complex_t<T> operator-(complex_t<T> a, complex_t<T> b) {
  return {a.real - b.real, a.imag - b.imag};
}

template <typename T>
constexpr complex_t<T> operator*(complex_t<T> a, complex_t<T> b) {
  return {a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real};
}

template <typename T>
constexpr complex_t<T> operator-(complex_t<T> a) {
  return {-a.real, -a.imag};
}

template <typename T>
constexpr complex_t<T> operator/(complex_t<T> a, complex_t<T> b) {
  T d = b.real * b.real + b.imag * b.imag;
  return {(a.real * b.real + a.imag * b.imag) / d, (a.imag * b.real - a.real * b.imag) / d};
}

template <typename T>
constexpr complex_t<T> operator%(complex_t<T> a, complex_t<T>) {
  return a;
}

template <typename T>
constexpr bool operator==(complex_t<T> a, complex_t<T> b) {
  return a.real == b.real && a.imag == b.imag;
}

#define MTL_COMPARISON(op)                                         \
  template <typename T>                                            \
  constexpr bool operator op(complex_t<T> a, complex_t<T> b) {     \
    return a.real == b.real ? a.imag op b.imag : a.real op b.real; \
  }
MTL_COMPARISON(<)
MTL_COMPARISON(>)
MTL_COMPARISON(<=)
MTL_COMPARISON(>=)
#undef MTL_COMPARISON

typedef complex_t<float> complex64_t;
