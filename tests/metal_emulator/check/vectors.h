// <metal_types>: vectors of 2, 3 and 4 elements. Swizzles, indexing and splats are clang's own.
#pragma once

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
}

#define MTL_VECTORS(T) \
  using T##2 = metal::vec<T, 2>; \
  using T##3 = metal::vec<T, 3>; \
  using T##4 = metal::vec<T, 4>;
MTL_VECTORS(bool)
MTL_VECTORS(char)
MTL_VECTORS(uchar)
MTL_VECTORS(short)
MTL_VECTORS(ushort)
MTL_VECTORS(int)
MTL_VECTORS(uint)
MTL_VECTORS(long)
MTL_VECTORS(ulong)
MTL_VECTORS(half)
MTL_VECTORS(float)
MTL_VECTORS(bfloat)
#undef MTL_VECTORS

namespace metal {

template <class T>
inline constexpr int component_count = 1;
template <class T, int N>
inline constexpr int component_count<T __attribute__((ext_vector_type(N)))> = N;

// `float4(a, b, c, d)`, `float4(xy, zw)`, `float4(s)`, `float4(half4_value)`: what the constructor macros call.
template <class V, class... A>
constexpr enable_if_t<
    (component_count<remove_cv_t<A>> + ... + 0) == component_count<V> ||
        (sizeof...(A) == 1 && (component_count<remove_cv_t<A>> + ... + 0) == 1),
    V>
construct(A... components);

} // namespace metal
