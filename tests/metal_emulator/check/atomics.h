// <metal_atomic>: relaxed order is the only one.
#pragma once

namespace metal {

enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  T unreadable;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_ulong = atomic<ulong>;
using atomic_float = atomic<float>;
using atomic_bool = atomic<bool>;

#define MTL_FETCH(name, space) \
  template <class T, class U>  \
  T atomic_##name##_explicit(volatile space atomic<T>*, U, memory_order);
#define MTL_ATOMICS(space)                                                         \
  MTL_FETCH(fetch_add, space)                                                      \
  MTL_FETCH(fetch_sub, space)                                                      \
  MTL_FETCH(fetch_max, space)                                                      \
  MTL_FETCH(fetch_min, space)                                                      \
  MTL_FETCH(fetch_and, space)                                                      \
  MTL_FETCH(fetch_or, space)                                                       \
  MTL_FETCH(fetch_xor, space)                                                      \
  MTL_FETCH(exchange, space)                                                       \
  template <class T, class U>                                                      \
  void atomic_store_explicit(volatile space atomic<T>*, U, memory_order);          \
  template <class T>                                                               \
  T atomic_load_explicit(const volatile space atomic<T>*, memory_order);           \
  template <class T, class U>                                                      \
  bool atomic_compare_exchange_weak_explicit(                                      \
      volatile space atomic<T>*, thread T* expected, U, memory_order, memory_order);
MTL_ATOMICS(device)
MTL_ATOMICS(threadgroup)
#undef MTL_ATOMICS
#undef MTL_FETCH

} // namespace metal
