// What is arithmetic, integral, signed; and <metal_limits>.
#pragma once
#include "mtl_bfloat.h"

namespace metal {
template <class T>
struct is_integral : false_type {};

#define MTL_INTEGRAL(type) \
  template <>              \
  struct is_integral<type> : true_type {};
MTL_INTEGRAL(bool)
MTL_INTEGRAL(char)
MTL_INTEGRAL(signed char)
MTL_INTEGRAL(uchar)
MTL_INTEGRAL(short)
MTL_INTEGRAL(ushort)
MTL_INTEGRAL(int)
MTL_INTEGRAL(uint)
MTL_INTEGRAL(long)
MTL_INTEGRAL(ulong)
MTL_INTEGRAL(long long)
MTL_INTEGRAL(unsigned long long)
#undef MTL_INTEGRAL

template <class T>
struct is_floating_point : false_type {};

template <>
struct is_floating_point<float> : true_type {};

template <>
struct is_floating_point<half> : true_type {};

template <>
struct is_floating_point<bfloat> : true_type {};
template <class T>
inline constexpr bool is_integral_v = is_integral<remove_cv_t<T>>::value;
template <class T>
inline constexpr bool is_floating_point_v = is_floating_point<remove_cv_t<T>>::value;

template <class T>
struct is_arithmetic : bool_constant<is_integral_v<T> || is_floating_point_v<T>> {};
template <class T>
inline constexpr bool is_arithmetic_v = is_arithmetic<T>::value;

template <class T>
struct is_scalar : bool_constant<is_arithmetic_v<T> || is_pointer_v<T>> {};

template <class T, bool = is_integral_v<T>>
struct mtl_has_sign {
  static constexpr bool value = true;
};

template <class T>
struct mtl_has_sign<T, true> {
  static constexpr bool value = T(-1) < T(0);
};

template <class T>
struct is_signed : bool_constant<mtl_has_sign<remove_cv_t<T>>::value && is_arithmetic_v<T>> {};

template <class T>
struct is_unsigned : bool_constant<is_integral_v<T> && !mtl_has_sign<remove_cv_t<T>>::value> {};
template <class T>
inline constexpr bool is_signed_v = is_signed<T>::value;
template <class T>
inline constexpr bool is_unsigned_v = is_unsigned<T>::value;

template <class T>
struct make_unsigned {
  typedef T type;
};

template <>
struct make_unsigned<int> {
  typedef uint type;
};

template <>
struct make_unsigned<short> {
  typedef ushort type;
};

template <>
struct make_unsigned<char> {
  typedef uchar type;
};

template <>
struct make_unsigned<long> {
  typedef ulong type;
};
template <class T>
using make_unsigned_t = typename make_unsigned<T>::type;

template <class T>
struct numeric_limits;
#define MTL_INTEGER_LIMITS(type, least, greatest, has_sign, bits)  \
  template <>                                                      \
  struct numeric_limits<type> {                                    \
    static constexpr type min() { return least; }                  \
    static constexpr type max() { return greatest; }               \
    static constexpr type lowest() { return least; }               \
    static constexpr bool is_signed = has_sign, is_integer = true; \
    static constexpr int digits = bits;                            \
  };
MTL_INTEGER_LIMITS(bool, false, true, false, 1)
MTL_INTEGER_LIMITS(char, -128, 127, true, 7)
MTL_INTEGER_LIMITS(signed char, -128, 127, true, 7)
MTL_INTEGER_LIMITS(uchar, 0, 255, false, 8)
MTL_INTEGER_LIMITS(short, -32768, 32767, true, 15)
MTL_INTEGER_LIMITS(ushort, 0, 65535, false, 16)
MTL_INTEGER_LIMITS(int, (-2147483647 - 1), 2147483647, true, 31)
MTL_INTEGER_LIMITS(uint, 0, 4294967295u, false, 32)
MTL_INTEGER_LIMITS(long, (-9223372036854775807l - 1), 9223372036854775807l, true, 63)
MTL_INTEGER_LIMITS(ulong, 0, 18446744073709551615ul, false, 64)
#undef MTL_INTEGER_LIMITS

template <>
struct numeric_limits<float> {
  static constexpr float min() { return __FLT_MIN__; }

  static constexpr float max() { return __FLT_MAX__; }

  static constexpr float lowest() { return -__FLT_MAX__; }

  static constexpr float infinity() { return __builtin_inff(); }

  static constexpr float quiet_NaN() { return __builtin_nanf(""); }

  static constexpr float epsilon() { return __FLT_EPSILON__; }

  static constexpr bool is_signed = true, is_integer = false;
};

template <>
struct numeric_limits<half> {
  static constexpr half min() { return (half)6.103515625e-05f; }

  static constexpr half max() { return (half)65504.f; }

  static constexpr half lowest() { return (half)-65504.f; }

  static constexpr half infinity() { return (half)__builtin_inff(); }

  static constexpr half quiet_NaN() { return (half)__builtin_nanf(""); }

  static constexpr half epsilon() { return (half)9.765625e-04f; }

  static constexpr bool is_signed = true, is_integer = false;
};

template <>
struct numeric_limits<bfloat> {
  static constexpr bfloat from_bits(unsigned short u) { return __builtin_bit_cast(bfloat, u); }

  static constexpr bfloat min() { return from_bits(0x0080); }

  static constexpr bfloat max() { return from_bits(0x7f7f); }

  static constexpr bfloat lowest() { return from_bits(0xff7f); }

  static constexpr bfloat infinity() { return from_bits(0x7f80); }

  static constexpr bfloat quiet_NaN() { return from_bits(0x7fc0); }

  static constexpr bfloat epsilon() { return from_bits(0x3c00); }

  static constexpr bool is_signed = true, is_integer = false;
};
}  // namespace metal
