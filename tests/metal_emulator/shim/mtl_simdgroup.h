// SIMD-group and quad-group functions. Each is a rendezvous: the runtime waits until every live lane has come to the
// same call, then calls one function here that reads all lanes' inputs and writes all their outputs.
#pragma once
#include "mtl_math.h"

namespace metal {
namespace mtl_detail {

template <class T>
constexpr void check_simd_type() {
  static_assert(!is_same_v<T, bool>, "MSL: SIMD-group functions do not accept bool");
  static_assert(sizeof(T) <= 4 || mtl_is_vec<T>::value, "MSL: SIMD-group functions do not accept 64-bit scalars");
}

constexpr int simd_width = 32;

MTL_NOSAN constexpr bool is_active(unsigned active, int lane) { return active >> lane & 1; }

template <class T>
MTL_NOSAN T& input(const mtl_lane& lane) {
  return *static_cast<T*>(lane.in);
}

template <class T>
MTL_NOSAN T& output(const mtl_lane& lane) {
  return *static_cast<T*>(lane.out);
}

template <class T>
MTL_NOSAN inline T meet(int operation, int line, mtl_simd_function function, T value, int parameter = 0,
                        int variant = 0) {
  T result;
  mtl_simd_operation(operation, line, function, mtl_lane{&value, &result, parameter, variant});
  return result;
}

struct Sum {
  template <class T>
  MTL_NOSAN static T combine(T a, T b) {
    return a + b;
  }

  template <class T>
  static T identity() {
    return T(0);
  }
};

struct Product {
  template <class T>
  MTL_NOSAN static T combine(T a, T b) {
    return a * b;
  }

  template <class T>
  static T identity() {
    return T(1);
  }
};

struct Maximum {
  template <class T>
  MTL_NOSAN static T combine(T a, T b) {
    return a > b ? a : b;
  }
};

struct Minimum {
  template <class T>
  MTL_NOSAN static T combine(T a, T b) {
    return a < b ? a : b;
  }
};

struct And {
  template <class T>
  MTL_NOSAN static T combine(T a, T b) {
    return a & b;
  }
};

struct Or {
  template <class T>
  MTL_NOSAN static T combine(T a, T b) {
    return a | b;
  }
};

struct Xor {
  template <class T>
  MTL_NOSAN static T combine(T a, T b) {
    // MLX's headers instantiate it for floats without ever calling it.
    if constexpr (is_floating_point_v<T>)
      return a;
    else
      return a ^ b;
  }
};

// The values of the lanes that take part. A butterfly may give an absent lane a value; it is then passed on.
template <class T>
struct Lanes {
  T value[simd_width];
  bool present[simd_width];
};

template <class T, class Operation>
MTL_NOSAN Lanes<T> butterfly_step(const Lanes<T>& lanes, int distance) {
  Lanes<T> next;
  for (int lane = 0; lane < simd_width; ++lane) {
    const int partner = lane ^ distance;
    const int low = lane < partner ? lane : partner, high = lane < partner ? partner : lane;
    next.present[lane] = lanes.present[low] || lanes.present[high];
    if (lanes.present[low] && lanes.present[high])
      next.value[lane] = Operation::combine(lanes.value[low], lanes.value[high]);
    else if (next.present[lane])
      next.value[lane] = lanes.value[lanes.present[low] ? low : high];
  }
  return next;
}

template <class T, class Operation>
MTL_NOSAN T sequential(const Lanes<T>& lanes) {
  T total{};
  bool started = false;
  for (int lane = 0; lane < simd_width; ++lane) {
    if (!lanes.present[lane]) continue;
    total = started ? Operation::combine(total, lanes.value[lane]) : lanes.value[lane];
    started = true;
  }
  return total;
}

template <class T, class Operation>
MTL_NOSAN void reduce(mtl_lane* lane_arguments, unsigned active, int) {
  Lanes<T> lanes;
  for (int lane = 0; lane < simd_width; ++lane) {
    lanes.present[lane] = is_active(active, lane);
    if (lanes.present[lane]) lanes.value[lane] = input<T>(lane_arguments[lane]);
  }
  const int order = mtl_current_reduce_order();
  if (order == MTL_SEQUENTIAL) {
    const T total = sequential<T, Operation>(lanes);
    for (int lane = 0; lane < simd_width; ++lane) lanes.value[lane] = total;
  } else {
    for (int step = 0; step < 5; ++step)
      lanes = butterfly_step<T, Operation>(lanes, order == MTL_ASCENDING ? 1 << step : 16 >> step);
  }
  for (int lane = 0; lane < simd_width; ++lane)
    if (is_active(active, lane)) output<T>(lane_arguments[lane]) = lanes.value[lane];
}

template <class T, class Operation, bool inclusive>
MTL_NOSAN void prefix(mtl_lane* lanes, unsigned active, int) {
  T total = Operation::template identity<T>();
  for (int lane = 0; lane < simd_width; ++lane) {
    if (!is_active(active, lane)) continue;
    const T before = total;
    total = Operation::combine(total, input<T>(lanes[lane]));
    output<T>(lanes[lane]) = inclusive ? total : before;
  }
}

enum Shuffle { from_lane, with_xor, up, down, rotate_up, rotate_down, from_first, broadcast };

// Lanes that a shift has nothing for keep their own value.
MTL_NOSAN inline int source_lane(Shuffle shuffle, int lane, int parameter, unsigned active) {
  switch (shuffle) {
    case from_lane:
    case broadcast: return parameter;
    case with_xor: return lane ^ parameter;
    case up: return lane < parameter ? lane : lane - parameter;
    case down: return lane + parameter >= simd_width ? lane : lane + parameter;
    case rotate_up: return (lane - parameter) & (simd_width - 1);
    case rotate_down: return (lane + parameter) & (simd_width - 1);
    case from_first: return __builtin_ctz(active);
  }
  return lane;
}

template <class T>
MTL_NOSAN void shuffle(mtl_lane* lanes, unsigned active, int line) {
  const int first = __builtin_ctz(active);
  for (int lane = 0; lane < simd_width; ++lane) {
    if (!is_active(active, lane)) continue;
    const Shuffle variant = static_cast<Shuffle>(lanes[lane].variant);
    if (variant == broadcast && lanes[lane].parameter != lanes[first].parameter)
      mtl_non_uniform(line, "simd_broadcast: the lane to read differs between lanes");
    int source = source_lane(variant, lane, lanes[lane].parameter, active);
    if (source < 0 || source >= simd_width) {
      mtl_bad_lane(line, "SIMD shuffle from a lane outside 0..31 (undefined in Metal)");
      source = lane;
    } else if (!is_active(active, source)) {
      mtl_bad_lane(line, "SIMD shuffle from an inactive or non-existent lane (undefined in Metal)");
      source = lane;
    }
    output<T>(lanes[lane]) = input<T>(lanes[source]);
  }
}

struct Votes {
  unsigned yes, active;
};

MTL_NOSAN inline void vote(mtl_lane* lanes, unsigned active, int) {
  unsigned yes = 0;
  for (int lane = 0; lane < simd_width; ++lane)
    if (is_active(active, lane) && input<int>(lanes[lane])) yes |= 1u << lane;
  for (int lane = 0; lane < simd_width; ++lane)
    if (is_active(active, lane)) output<Votes>(lanes[lane]) = Votes{yes, active};
}

MTL_NOSAN inline Votes take_votes(bool opinion, int line) {
  int value = opinion;
  Votes votes;
  mtl_simd_operation(MTL_OP_VOTE, line, &vote, mtl_lane{&value, &votes, 0, 0});
  return votes;
}

}  // namespace mtl_detail

#define MTL_REDUCTION(name, Operation)                                                                      \
  template <class T>                                                                                        \
  inline T name(T x, MTL_LINE) {                                                                            \
    mtl_detail::check_simd_type<T>();                                                                       \
    return mtl_detail::meet<T>(MTL_OP_REDUCE, mtl_line_, &mtl_detail::reduce<T, mtl_detail::Operation>, x); \
  }
MTL_REDUCTION(simd_sum, Sum)
MTL_REDUCTION(simd_product, Product)
MTL_REDUCTION(simd_max, Maximum)
MTL_REDUCTION(simd_min, Minimum)
MTL_REDUCTION(simd_and, And)
MTL_REDUCTION(simd_or, Or)
MTL_REDUCTION(simd_xor, Xor)
#undef MTL_REDUCTION

#define MTL_PREFIX(name, Operation, inclusive)                                                                         \
  template <class T>                                                                                                   \
  inline T name(T x, MTL_LINE) {                                                                                       \
    mtl_detail::check_simd_type<T>();                                                                                  \
    return mtl_detail::meet<T>(MTL_OP_PREFIX, mtl_line_, &mtl_detail::prefix<T, mtl_detail::Operation, inclusive>, x); \
  }
MTL_PREFIX(simd_prefix_inclusive_sum, Sum, true)
MTL_PREFIX(simd_prefix_exclusive_sum, Sum, false)
MTL_PREFIX(simd_prefix_inclusive_product, Product, true)
MTL_PREFIX(simd_prefix_exclusive_product, Product, false)
#undef MTL_PREFIX

#define MTL_SHUFFLE(name, operation, variant)                                                                     \
  template <class T>                                                                                              \
  inline T name(T x, ushort parameter, MTL_LINE) {                                                                \
    mtl_detail::check_simd_type<T>();                                                                             \
    return mtl_detail::meet<T>(operation, mtl_line_, &mtl_detail::shuffle<T>, x, parameter, mtl_detail::variant); \
  }
MTL_SHUFFLE(simd_shuffle, MTL_OP_SHUFFLE, from_lane)
MTL_SHUFFLE(simd_shuffle_xor, MTL_OP_SHUFFLE, with_xor)
MTL_SHUFFLE(simd_shuffle_up, MTL_OP_SHUFFLE, up)
MTL_SHUFFLE(simd_shuffle_down, MTL_OP_SHUFFLE, down)
MTL_SHUFFLE(simd_shuffle_rotate_up, MTL_OP_SHUFFLE, rotate_up)
MTL_SHUFFLE(simd_shuffle_rotate_down, MTL_OP_SHUFFLE, rotate_down)
MTL_SHUFFLE(simd_broadcast, MTL_OP_BROADCAST, broadcast)
#undef MTL_SHUFFLE

template <class T>
inline T simd_broadcast_first(T x, MTL_LINE) {
  return mtl_detail::meet<T>(MTL_OP_BROADCAST, mtl_line_, &mtl_detail::shuffle<T>, x, 0, mtl_detail::from_first);
}

template <class T>
inline T simd_shuffle_and_fill_up(T x, T filling, ushort delta, MTL_LINE) {
  const T shifted = simd_shuffle_up(x, delta, mtl_line_);
  const T filled = simd_shuffle(filling, (ushort)((mtl_lane_index() + 32 - delta) & 31), mtl_line_);
  return mtl_lane_index() < delta ? filled : shifted;
}

template <class T>
inline T simd_shuffle_and_fill_down(T x, T filling, ushort delta, MTL_LINE) {
  const T shifted = simd_shuffle_down(x, delta, mtl_line_);
  const T filled = simd_shuffle(filling, (ushort)((mtl_lane_index() + delta) & 31), mtl_line_);
  return mtl_lane_index() + delta > 31 ? filled : shifted;
}

struct simd_vote {
  typedef unsigned long vote_t;
  vote_t votes;
  simd_vote() = default;

  explicit constexpr simd_vote(vote_t v) : votes(v) {}

  explicit operator vote_t() const { return votes; }

  bool all() const { return votes == 0xffffffffu; }

  bool any() const { return votes != 0; }
};

inline simd_vote simd_ballot(bool opinion, MTL_LINE) {
  return simd_vote(mtl_detail::take_votes(opinion, mtl_line_).yes);
}

inline bool simd_all(bool opinion, MTL_LINE) {
  const mtl_detail::Votes votes = mtl_detail::take_votes(opinion, mtl_line_);
  return votes.yes == votes.active;
}

inline bool simd_any(bool opinion, MTL_LINE) { return mtl_detail::take_votes(opinion, mtl_line_).yes != 0; }

inline bool simd_is_first(MTL_LINE) {
  return (unsigned)__builtin_ctz(mtl_detail::take_votes(true, mtl_line_).active) == mtl_lane_index();
}

inline simd_vote simd_active_threads_mask(MTL_LINE) {
  return simd_vote(mtl_detail::take_votes(true, mtl_line_).active);
}

// Groups of four lanes. Stricter than Metal: the whole SIMD-group has to arrive.
template <class T>
inline T quad_shuffle_xor(T x, ushort mask, MTL_LINE) {
  return simd_shuffle_xor(x, (ushort)(mask & 3), mtl_line_);
}

template <class T>
inline T quad_broadcast(T x, ushort lane, MTL_LINE) {
  return simd_shuffle(x, (ushort)((mtl_lane_index() & ~3u) + (lane & 3)), mtl_line_);
}

template <class T>
inline T quad_shuffle(T x, ushort lane, MTL_LINE) {
  return quad_broadcast(x, lane, mtl_line_);
}

template <class T>
inline T quad_sum(T x, MTL_LINE) {
  x = x + simd_shuffle_xor(x, 1, mtl_line_);
  return x + simd_shuffle_xor(x, 2, mtl_line_);
}

template <class T>
inline T quad_max(T x, MTL_LINE) {
  x = mtl_detail::Maximum::combine(x, simd_shuffle_xor(x, 1, mtl_line_));
  return mtl_detail::Maximum::combine(x, simd_shuffle_xor(x, 2, mtl_line_));
}

}  // namespace metal

// The compiler builtins behind these functions, which MLX's headers call directly.
#define MTL_FORWARD(name)                  \
  template <class T>                       \
  inline T __metal_##name(T x, MTL_LINE) { \
    return metal::name(x, mtl_line_);      \
  }
MTL_FORWARD(simd_sum)
MTL_FORWARD(simd_product)
MTL_FORWARD(simd_max)
MTL_FORWARD(simd_min)
MTL_FORWARD(simd_xor)
MTL_FORWARD(simd_prefix_inclusive_sum)
MTL_FORWARD(simd_prefix_exclusive_sum)
MTL_FORWARD(simd_prefix_inclusive_product)
MTL_FORWARD(simd_prefix_exclusive_product)
#undef MTL_FORWARD

#define MTL_FORWARD(name)                                    \
  template <class T>                                         \
  inline T __metal_##name(T x, ushort parameter, MTL_LINE) { \
    return metal::name(x, parameter, mtl_line_);             \
  }
MTL_FORWARD(simd_broadcast)
MTL_FORWARD(simd_shuffle)
MTL_FORWARD(simd_shuffle_xor)
MTL_FORWARD(simd_shuffle_up)
MTL_FORWARD(simd_shuffle_down)
MTL_FORWARD(simd_shuffle_rotate_up)
MTL_FORWARD(simd_shuffle_rotate_down)
#undef MTL_FORWARD

template <class T>
inline T __metal_simd_shuffle_and_fill_up(T x, T filling, ushort delta, ushort, MTL_LINE) {
  return metal::simd_shuffle_and_fill_up(x, filling, delta, mtl_line_);
}

template <class T>
inline T __metal_simd_shuffle_and_fill_down(T x, T filling, ushort delta, ushort, MTL_LINE) {
  return metal::simd_shuffle_and_fill_down(x, filling, delta, mtl_line_);
}

inline ushort __metal_get_simdgroup_size(ushort) { return 32; }

inline ushort __metal_get_thread_index_in_simdgroup(ushort) { return (ushort)mtl_lane_index(); }
