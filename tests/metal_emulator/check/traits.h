// <metal_type_traits>, <metal_limits> and <metal_array>.
#pragma once

namespace metal {

template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return v; }
  constexpr T operator()() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;

template <class... B>
struct conjunction : bool_constant<(bool(B::value) && ...)> {};
template <class... B>
struct disjunction : bool_constant<(bool(B::value) || ...)> {};

// `name<T>` is `name<pattern of U>`'s type U where T matches, else T itself.
#define MTL_STRIP(name, pattern)            \
  template <class T>                        \
  struct name {                             \
    using type = T;                         \
  };                                        \
  template <class T>                        \
  struct name<pattern> {                    \
    using type = T;                         \
  };                                        \
  template <class T>                        \
  using name##_t = typename name<T>::type;
MTL_STRIP(remove_const, const T)
MTL_STRIP(remove_volatile, volatile T)
MTL_STRIP(remove_reference, T&)
MTL_STRIP(remove_pointer, T*)
MTL_STRIP(remove_extent, T[])
#undef MTL_STRIP
template <class T>
using remove_cv_t = remove_const_t<remove_volatile_t<T>>;
template <class T>
struct remove_cv {
  using type = remove_cv_t<T>;
};
template <class T>
struct remove_addrspace {
  using type = T;
};
template <class T>
struct remove_addrspace<device T> {
  using type = T;
};
template <class T>
struct remove_addrspace<const __attribute__((address_space(2))) T> {
  using type = const T;
};
template <class T>
struct remove_addrspace<threadgroup T> {
  using type = T;
};
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;

#define MTL_TRAIT(name, ...)                        \
  template <class T>                                \
  struct name : bool_constant<(__VA_ARGS__)> {};    \
  template <class T>                                \
  inline constexpr bool name##_v = name<T>::value;
MTL_TRAIT(is_integral, __is_integral(T))
MTL_TRAIT(is_floating_point, __is_floating_point(T))
MTL_TRAIT(is_arithmetic, __is_arithmetic(T))
MTL_TRAIT(is_scalar, __is_scalar(T))
MTL_TRAIT(is_signed, __is_signed(T))
MTL_TRAIT(is_unsigned, __is_unsigned(T))
MTL_TRAIT(is_pointer, __is_pointer(T))
MTL_TRAIT(is_reference, __is_reference(T))
MTL_TRAIT(is_array, __is_array(T))
MTL_TRAIT(is_class, __is_class(T))
MTL_TRAIT(is_const, __is_const(T))
MTL_TRAIT(is_void, __is_void(T))
MTL_TRAIT(is_empty, __is_empty(T))
#undef MTL_TRAIT

template <class T, class U>
struct is_same : bool_constant<__is_same(T, U)> {};
template <class T, class U>
inline constexpr bool is_same_v = __is_same(T, U);
template <class From, class To>
struct is_convertible : bool_constant<__is_convertible_to(From, To)> {};
template <class From, class To>
inline constexpr bool is_convertible_v = __is_convertible_to(From, To);
template <class Base, class T>
inline constexpr bool is_base_of_v = __is_base_of(Base, T);

template <class T>
using make_unsigned_t = __make_unsigned(T);
template <class T>
using make_signed_t = __make_signed(T);

template <class T>
T&& declval() noexcept;
template <class T>
constexpr remove_reference_t<T>&& move(T&& value) noexcept;
template <class T>
constexpr T&& forward(remove_reference_t<T>& value) noexcept;
template <class T>
void swap(thread T& a, thread T& b);

// Values stand for the type's own only where a kernel's text could compute with them at compile time.
template <class T>
struct numeric_limits {
  static constexpr bool is_signed = T(-1) < T(0);
  static constexpr bool is_integer = true;
  static constexpr int digits = 8 * sizeof(T) - is_signed;
  static constexpr T min() { return is_signed ? T(T(1) << (8 * sizeof(T) - 1)) : T(0); }
  static constexpr T max() { return T(~min()); }
  static constexpr T lowest() { return min(); }
};
template <>
struct numeric_limits<bool> {
  static constexpr bool is_signed = false, is_integer = true;
  static constexpr int digits = 1;
  static constexpr bool min() { return false; }
  static constexpr bool max() { return true; }
  static constexpr bool lowest() { return false; }
};
#define MTL_FLOAT_LIMITS(T, smallest, largest, step)                             \
  template <>                                                                    \
  struct numeric_limits<T> {                                                     \
    static constexpr bool is_signed = true, is_integer = false;                  \
    static constexpr T min() { return static_cast<T>(smallest); }                \
    static constexpr T max() { return static_cast<T>(largest); }                 \
    static constexpr T lowest() { return static_cast<T>(-largest); }             \
    static constexpr T epsilon() { return static_cast<T>(step); }                \
    static constexpr T infinity() { return static_cast<T>(__builtin_inff()); }   \
    static constexpr T quiet_NaN() { return static_cast<T>(__builtin_nanf("")); } \
  };
MTL_FLOAT_LIMITS(float, __FLT_MIN__, __FLT_MAX__, __FLT_EPSILON__)
MTL_FLOAT_LIMITS(half, 6.103515625e-05f, 65504.f, 9.765625e-04f)
MTL_FLOAT_LIMITS(bfloat, __FLT_MIN__, 3.38953139e38f, 0.0078125f)
#undef MTL_FLOAT_LIMITS

template <class T, size_t N>
struct array {
  T elements[N];
  constexpr T operator[](size_t i) const;
  T& operator[](size_t i);
};

// <metal_uniform>
template <class T>
using uniform = T;
template <class T>
T make_uniform(T value);

} // namespace metal
