// Threadgroup variables (rewrite.py turns their declarations into references to this memory), uniform, os_log.
#pragma once
#include "mtl_traits.h"

namespace metal {

template <class Variable, int id>
inline Variable& mtl_threadgroup_variable(const char* name, MTL_LINE) {
  typedef typename remove_all_extents<Variable>::type Element;
  constexpr int granule = alignof(Element) > 4 ? 4 : (int)alignof(Element);
  return *(Variable*)mtl_threadgroup_memory(id, sizeof(Variable), granule, name, mtl_line_);
}

template <class T>
struct uniform {
  T value;
  uniform() = default;

  constexpr uniform(T x) : value(x) {}

  constexpr operator T() const { return value; }
};

template <class T>
constexpr uniform<T> make_uniform(T x) {
  return uniform<T>(x);
}

struct os_log {
  constexpr os_log(const char*, const char*) {}

  template <class... Arguments>
  void log_debug(const char*, Arguments...) const {}
};

}  // namespace metal
