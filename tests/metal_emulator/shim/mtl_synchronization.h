// Barriers and atomics.
#pragma once
#include "mtl_traits.h"

namespace metal {

enum class mem_flags {
  mem_none = 0,
  mem_device = MTL_MEM_DEVICE,
  mem_threadgroup = MTL_MEM_THREADGROUP,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};

constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags((int)a | (int)b); }

enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };

enum memory_order {
  memory_order_relaxed,
  memory_order_acquire,
  memory_order_release,
  memory_order_acq_rel,
  memory_order_seq_cst
};

inline void threadgroup_barrier(mem_flags flags, MTL_LINE) { mtl_threadgroup_barrier((int)flags, mtl_line_); }

inline void simdgroup_barrier(mem_flags flags, MTL_LINE) { mtl_simdgroup_barrier((int)flags, mtl_line_); }

inline void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}

template <class T, class = void>
struct atomic {
  static_assert(is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, float> || is_same_v<T, bool> ||
                    is_same_v<T, ulong>,
                "MSL: atomic<T> needs int, uint, ulong, float or bool");
  T value;
};

typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;

namespace mtl_detail {
MTL_NOSAN inline void announce(const volatile void* address, int size, int kind, memory_order order, int line) {
  if (order != memory_order_relaxed) mtl_bad_atomic_order(line);
  mtl_atomic_access(address, size, kind);
}
}  // namespace mtl_detail

#define MTL_ATOMIC_FUNCTION(name, kind, result)                                                   \
  template <class T, class U>                                                                     \
  MTL_NOSAN inline T name(volatile atomic<T>* object, U argument, memory_order order, MTL_LINE) { \
    mtl_detail::announce(object, sizeof(T), kind, order, mtl_line_);                              \
    const T operand = (T)argument, old = object->value;                                           \
    object->value = result;                                                                       \
    return old;                                                                                   \
  }
MTL_ATOMIC_FUNCTION(atomic_fetch_add_explicit, MTL_ATOMIC_UPDATE, old + operand)
MTL_ATOMIC_FUNCTION(atomic_fetch_sub_explicit, MTL_ATOMIC_UPDATE, old - operand)
MTL_ATOMIC_FUNCTION(atomic_fetch_max_explicit, MTL_ATOMIC_UPDATE, old > operand ? old : operand)
MTL_ATOMIC_FUNCTION(atomic_fetch_min_explicit, MTL_ATOMIC_UPDATE, old < operand ? old : operand)
MTL_ATOMIC_FUNCTION(atomic_fetch_and_explicit, MTL_ATOMIC_UPDATE, old& operand)
MTL_ATOMIC_FUNCTION(atomic_fetch_or_explicit, MTL_ATOMIC_UPDATE, old | operand)
MTL_ATOMIC_FUNCTION(atomic_fetch_xor_explicit, MTL_ATOMIC_UPDATE, old ^ operand)
MTL_ATOMIC_FUNCTION(atomic_exchange_explicit, MTL_ATOMIC_UPDATE, operand)
#undef MTL_ATOMIC_FUNCTION

template <class T, class U>
MTL_NOSAN inline void atomic_store_explicit(volatile atomic<T>* object, U value, memory_order order, MTL_LINE) {
  mtl_detail::announce(object, sizeof(T), MTL_ATOMIC_STORE, order, mtl_line_);
  object->value = (T)value;
}

template <class T>
MTL_NOSAN inline T atomic_load_explicit(const volatile atomic<T>* object, memory_order order, MTL_LINE) {
  mtl_detail::announce(object, sizeof(T), MTL_ATOMIC_LOAD, order, mtl_line_);
  return object->value;
}

template <class T, class U>
MTL_NOSAN inline bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* object, T* expected, U desired,
                                                            memory_order success, memory_order failure, MTL_LINE) {
  const memory_order stronger = success > failure ? success : failure;
  mtl_detail::announce(object, sizeof(T), MTL_ATOMIC_UPDATE, stronger, mtl_line_);
  if (__builtin_memcmp((const void*)&object->value, expected, sizeof(T)) == 0) {
    object->value = (T)desired;
    return true;
  }
  *expected = object->value;
  return false;
}

}  // namespace metal
