// <metal_type_traits>; move, forward and swap; as_type.
#pragma once
#include "mtl_language.h"

namespace metal {
template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
  typedef T value_type;
  typedef integral_constant type;

  constexpr operator T() const { return v; }

  constexpr T operator()() const { return v; }
};

typedef integral_constant<bool, true> true_type;
typedef integral_constant<bool, false> false_type;
template <bool B>
using bool_constant = integral_constant<bool, B>;

template <bool B, class T = void>
struct enable_if {};

template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F>
struct conditional {
  typedef T type;
};

template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;

template <class T, class U>
struct is_same : false_type {};

template <class T>
struct is_same<T, T> : true_type {};
template <class T, class U>
inline constexpr bool is_same_v = is_same<T, U>::value;

template <class T>
struct remove_const {
  typedef T type;
};

template <class T>
struct remove_const<const T> {
  typedef T type;
};

template <class T>
struct remove_volatile {
  typedef T type;
};

template <class T>
struct remove_volatile<volatile T> {
  typedef T type;
};

template <class T>
struct remove_cv {
  typedef typename remove_volatile<typename remove_const<T>::type>::type type;
};
template <class T>
using remove_cv_t = typename remove_cv<T>::type;

template <class T>
struct remove_reference {
  typedef T type;
};

template <class T>
struct remove_reference<T&> {
  typedef T type;
};

template <class T>
struct remove_reference<T&&> {
  typedef T type;
};
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class T>
using remove_addrspace_t = T;

template <class T>
struct remove_addrspace {
  typedef T type;
};

template <class T>
struct remove_pointer {
  typedef T type;
};

template <class T>
struct remove_pointer<T*> {
  typedef T type;
};
template <class T>
using remove_pointer_t = typename remove_pointer<T>::type;

template <class T>
struct remove_extent {
  typedef T type;
};

template <class T>
struct remove_extent<T[]> {
  typedef T type;
};

template <class T, size_t N>
struct remove_extent<T[N]> {
  typedef T type;
};

template <class T>
struct remove_all_extents {
  typedef T type;
};

template <class T, size_t N>
struct remove_all_extents<T[N]> {
  typedef typename remove_all_extents<T>::type type;
};

template <class T>
struct is_pointer : false_type {};

template <class T>
struct is_pointer<T*> : true_type {};
template <class T>
inline constexpr bool is_pointer_v = is_pointer<T>::value;

template <class T>
struct is_const : false_type {};

template <class T>
struct is_const<const T> : true_type {};

template <class T>
struct is_void : is_same<remove_cv_t<T>, void> {};
template <class T>
inline constexpr bool is_void_v = is_void<T>::value;

namespace mtl_detail {
template <class... Ts>
struct make_void {
  typedef void type;
};
template <class... Ts>
using void_type = typename make_void<Ts...>::type;
}  // namespace mtl_detail
template <class T>
T&& declval() noexcept;

namespace mtl_detail {
template <class F, class T, class = void>
struct converts : false_type {};
template <class T>
void take(T);

template <class F, class T>
struct converts<F, T, void_type<decltype(take<T>(declval<F>()))>> : true_type {};
}  // namespace mtl_detail

template <class F, class T>
struct is_convertible : mtl_detail::converts<F, T> {};
template <class F, class T>
inline constexpr bool is_convertible_v = is_convertible<F, T>::value;

template <class... B>
struct _disjunction : false_type {};

template <class B>
struct _disjunction<B> : B {};

template <class B, class... R>
struct _disjunction<B, R...> : conditional_t<bool(B::value), B, _disjunction<R...>> {};

template <class... B>
struct disjunction : _disjunction<B...> {};

template <class... B>
struct conjunction : true_type {};

template <class B>
struct conjunction<B> : B {};

template <class B, class... R>
struct conjunction<B, R...> : conditional_t<bool(B::value), conjunction<R...>, B> {};

template <class T>
constexpr remove_reference_t<T>&& move(T&& t) noexcept {
  return static_cast<remove_reference_t<T>&&>(t);
}

template <class T>
constexpr T&& forward(remove_reference_t<T>& t) noexcept {
  return static_cast<T&&>(t);
}

template <class T>
inline void swap(T& a, T& b) {
  T t = a;
  a = b;
  b = t;
}
}  // namespace metal

template <class T, class U>
constexpr T as_type(U u) {
  static_assert(sizeof(T) == sizeof(U), "as_type: sizes differ");
  return __builtin_bit_cast(T, u);
}
