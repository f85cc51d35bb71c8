// Scalar types, macros and constants of MSL. No standard header is included, only compiler builtins: so ::exp and
// ::abs of libm cannot make metal::exp and metal::abs ambiguous.
#pragma once
#include "abi.h"
#pragma GCC diagnostic ignored "-Wliteral-suffix"

#define __METAL__ 1
#ifndef __METAL_VERSION__
#define __METAL_VERSION__ 400
#endif
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0
#define __METAL_MAYBE_FAST_MATH__ 0
#define MTL_NOSAN __attribute__((no_sanitize("thread", "undefined")))
#define MTL_LINE int mtl_line_ = __builtin_LINE()

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __INT8_TYPE__ int8_t;
typedef __INT16_TYPE__ int16_t;
typedef __INT32_TYPE__ int32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __UINT64_TYPE__ uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef unsigned long uintptr_t;
typedef _Float16 half;
#ifndef INFINITY
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#endif
#define HUGE_VALF __builtin_inff()
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define HALF_MAX ((half)65504.0f)
#define M_PI_F 3.14159265358979323846f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define M_LN10_F 2.30258509299404568402f
#define M_LOG10E_F 0.434294481903251827651f
#define M_PI_2_F 1.57079632679489661923f
#define M_SQRT1_2_F 0.707106781186547524401f
#define M_SQRT2_F 1.41421356237309504880f
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define USHRT_MAX 65535
