// bfloat by MSL's rules: integers convert implicitly, float and half do not.
#pragma once
#include "mtl_traits.h"

template <class I>
inline constexpr bool mtl_is_index_v =
    metal::is_same_v<I, int> || metal::is_same_v<I, uint> || metal::is_same_v<I, short> || metal::is_same_v<I, ushort>;

struct bfloat {
  unsigned short bits;
  bfloat() = default;

  static constexpr unsigned short nearest_even(float f) {
    unsigned u = __builtin_bit_cast(unsigned, f);
    if ((u & 0x7fffffff) > 0x7f800000) return (u >> 16) | 64;
    return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }

  constexpr explicit bfloat(float f) : bits(nearest_even(f)) {}

  constexpr explicit bfloat(half f) : bits(nearest_even((float)f)) {}

  constexpr explicit bfloat(double f) : bits(nearest_even((float)f)) {}

  // int -> bfloat is implicit in MSL (MLX itself writes `bfloat x[n] = {0};`); float/half -> bfloat is not.
  template <class I, metal::enable_if_t<mtl_is_index_v<I> || metal::is_same_v<I, bool> || metal::is_same_v<I, char> ||
                                            metal::is_same_v<I, signed char> || metal::is_same_v<I, uchar> ||
                                            metal::is_same_v<I, long> || metal::is_same_v<I, ulong>,
                                        int> = 0>
  constexpr bfloat(I i) : bits(nearest_even((float)i)) {}

  constexpr operator float() const { return __builtin_bit_cast(float, (unsigned)bits << 16); }

  constexpr bfloat operator-() const {
    bfloat r = *this;
    r.bits ^= 0x8000;
    return r;
  }
};

#define MTL_ARITHMETIC(op, assign)                                                          \
  constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); } \
  constexpr float operator op(bfloat a, float b) { return float(a) op b; }                  \
  constexpr float operator op(float a, bfloat b) { return a op float(b); }                  \
  template <class I, metal::enable_if_t<mtl_is_index_v<I>, int> = 0>                        \
  constexpr bfloat operator op(bfloat a, I b) {                                             \
    return bfloat(float(a) op float(b));                                                    \
  }                                                                                         \
  template <class I, metal::enable_if_t<mtl_is_index_v<I>, int> = 0>                        \
  constexpr bfloat operator op(I a, bfloat b) {                                             \
    return bfloat(float(a) op float(b));                                                    \
  }                                                                                         \
  inline bfloat& operator assign(bfloat& a, bfloat b) {                                     \
    a = a op b;                                                                             \
    return a;                                                                               \
  }
MTL_ARITHMETIC(+, +=)
MTL_ARITHMETIC(-, -=)
MTL_ARITHMETIC(*, *=)
MTL_ARITHMETIC(/, /=)
#undef MTL_ARITHMETIC

#define MTL_COMPARISON(op) \
  constexpr bool operator op(bfloat a, bfloat b) { return float(a) op float(b); }
MTL_COMPARISON(<)
MTL_COMPARISON(>)
MTL_COMPARISON(<=)
MTL_COMPARISON(>=)
MTL_COMPARISON(==)
MTL_COMPARISON(!=)
#undef MTL_COMPARISON

constexpr half operator""h(long double v) { return (half)v; }

constexpr bfloat operator"" bf(long double v) { return bfloat((float)v); }
