// Stands in for MLX's kernels/complex.h, which overloads constructors on the address space of `this`: a thing
// that clang has in OpenCL only. Complex numbers in a kernel are checked no further than this.
#pragma once

#include "mlx/backend/metal/kernels/bf16.h"

using namespace metal;

template <typename T>
struct complex_t {
  using value_type = T;
  T real;
  T imag;
  constexpr complex_t(T real, T imag) : real(real), imag(imag) {}
  constexpr complex_t(T real = 0) : real(real), imag(0) {}
};
using complex64_t = complex_t<float>;
