// A small metal_stdlib for emulated kernels: types, pointers with an address space, maths, simdgroup operations.
//
// It covers what kernels of this project use and what MLX's prelude gives them. Names and meanings follow the Metal
// Shading Language Specification; what is not here does not compile, which is the safe side.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "engine.hpp"

#define METAL_FUNC inline
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f

using uint = unsigned int;
using ushort = unsigned short;
using uchar = unsigned char;
using ulong = unsigned long;

namespace metal {

using emulator::Region;
using emulator::Space;

// ----------------------------------------------------------------------------------------------------- traits

using std::bool_constant;
using std::conditional_t;
using std::enable_if_t;
using std::is_integral;
using std::is_same;
using std::is_same_v;
using std::remove_cv_t;
template <typename T>
using remove_addrspace_t = std::remove_cv_t<T>;

// ------------------------------------------------------------------------------------------- 16-bit floats

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t half_bits(float value) {  // round to nearest even, overflow to infinity
  const uint32_t x = bits_of(value), sign = (x >> 16) & 0x8000u, magnitude = x & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return uint16_t(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u);
  if (magnitude < 0x38800000u) {  // subnormal: let the addition round
    const float shifted = float_of(magnitude) + 0.5f;
    return uint16_t(sign | (bits_of(shifted) - 0x3F000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xFFFu + odd) >> 13));
}
inline float half_value(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
  if (magnitude < 0x0400u) return float_of(sign | bits_of(float(magnitude) * 0x1p-24f));
  return float_of(sign | ((magnitude << 13) + 0x38000000u));
}
inline uint16_t bfloat_bits(float value) {  // round to nearest even
  const uint32_t x = bits_of(value);
  if ((x & 0x7FFFFFFFu) > 0x7F800000u) return uint16_t((x >> 16) | 0x40u);
  return uint16_t((x + 0x7FFFu + ((x >> 16) & 1u)) >> 16);
}

// half converts both ways by itself, bfloat only to float, as in Metal.
struct half {
  uint16_t bits;
  half() = default;
  half(float value) : bits(half_bits(value)) {}
  half(int value) : half(float(value)) {}
  operator float() const { return half_value(bits); }
};
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float value) : bits(bfloat_bits(value)) {}
  explicit bfloat(int value) : bfloat(float(value)) {}
  explicit bfloat(half value) : bfloat(float(value)) {}
  operator float() const { return float_of(uint32_t(bits) << 16); }
};
#define MLXLM_OPERATORS(T)                                                    \
  inline T operator+(T a, T b) { return T(float(a) + float(b)); }             \
  inline T operator-(T a, T b) { return T(float(a) - float(b)); }             \
  inline T operator*(T a, T b) { return T(float(a) * float(b)); }             \
  inline T operator/(T a, T b) { return T(float(a) / float(b)); }             \
  inline T operator-(T a) { return T(-float(a)); }                            \
  inline T& operator+=(T& a, T b) { return a = a + b; }                       \
  inline T& operator-=(T& a, T b) { return a = a - b; }                       \
  inline T& operator*=(T& a, T b) { return a = a * b; }
MLXLM_OPERATORS(half)
MLXLM_OPERATORS(bfloat)
#undef MLXLM_OPERATORS

// -------------------------------------------------------------------------------------------------- vectors

template <typename T, int N>
struct vec;
template <typename T>
struct vec<T, 2> {
  T x, y;
  vec() = default;
  vec(T all) : x(all), y(all) {}
  vec(T a, T b) : x(a), y(b) {}
  template <typename U>
  explicit vec(const vec<U, 2>& other) : x(static_cast<T>(other.x)), y(static_cast<T>(other.y)) {}
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};
template <typename T>
struct vec<T, 3> {
  T x, y, z;
  T padding;  // a vector of three takes the room of four
  vec() = default;
  vec(T all) : x(all), y(all), z(all), padding() {}
  vec(T a, T b, T c) : x(a), y(b), z(c), padding() {}
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};
template <typename T>
struct vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  vec(T all) : x(all), y(all), z(all), w(all) {}
  vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  template <typename U>
  explicit vec(const vec<U, 4>& o)
      : x(static_cast<T>(o.x)), y(static_cast<T>(o.y)), z(static_cast<T>(o.z)), w(static_cast<T>(o.w)) {}
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};

#define MLXLM_VECTOR_OPERATOR(OP)                                                                     \
  template <typename T, int N>                                                                        \
  vec<T, N> operator OP(vec<T, N> a, const vec<T, N>& b) {                                            \
    for (int i = 0; i < N; ++i) a[i] = a[i] OP b[i];                                                  \
    return a;                                                                                         \
  }                                                                                                   \
  template <typename T, int N>                                                                        \
  vec<T, N> operator OP(vec<T, N> a, T b) {                                                           \
    return a OP vec<T, N>(b);                                                                         \
  }                                                                                                   \
  template <typename T, int N>                                                                        \
  vec<T, N> operator OP(T a, const vec<T, N>& b) {                                                    \
    return vec<T, N>(a) OP b;                                                                         \
  }                                                                                                   \
  template <typename T, int N, typename U>                                                            \
  vec<T, N>& operator OP##=(vec<T, N>& a, const U& b) {                                               \
    return a = a OP b;                                                                                \
  }
MLXLM_VECTOR_OPERATOR(+)
MLXLM_VECTOR_OPERATOR(-)
MLXLM_VECTOR_OPERATOR(*)
MLXLM_VECTOR_OPERATOR(/)
#undef MLXLM_VECTOR_OPERATOR

#define MLXLM_VECTORS(T)  \
  using T##2 = vec<T, 2>; \
  using T##3 = vec<T, 3>; \
  using T##4 = vec<T, 4>;
MLXLM_VECTORS(float)
MLXLM_VECTORS(half)
MLXLM_VECTORS(bfloat)
MLXLM_VECTORS(int)
MLXLM_VECTORS(uint)
MLXLM_VECTORS(short)
MLXLM_VECTORS(ushort)
MLXLM_VECTORS(ulong)
MLXLM_VECTORS(bool)
#undef MLXLM_VECTORS

// ------------------------------------------------------------------------------------------------- pointers

template <typename T, Space S>
class pointer;

// What *p and p[i] give: reads and writes go through the region.
template <typename T, Space S>
class reference {
 public:
  using value_type = std::remove_const_t<T>;
  reference(const Region* region, T* address) : region_(region), address_(address) {}
  reference(const reference&) = default;
  value_type load() const {
    emulator::emulator_load(region_, address_, sizeof(T), false);
    value_type value;
    memcpy(&value, static_cast<const void*>(address_), sizeof(T));  // addresses need not be aligned here
    return value;
  }
  operator value_type() const { return load(); }
  template <typename U, typename = std::enable_if_t<!std::is_same_v<U, value_type>>>
  explicit operator U() const {
    return static_cast<U>(load());
  }
  const reference& operator=(const value_type& value) const {
    static_assert(!std::is_const_v<T>, "a store through a pointer to const");
    emulator::emulator_store(region_, address_, sizeof(T), false);
    memcpy(static_cast<void*>(address_), &value, sizeof(T));
    return *this;
  }
  const reference& operator=(const reference& other) const { return *this = other.load(); }
  const reference& operator+=(const value_type& value) const { return *this = load() + value; }
  const reference& operator-=(const value_type& value) const { return *this = load() - value; }
  const reference& operator*=(const value_type& value) const { return *this = load() * value; }
  pointer<T, S> operator&() const { return pointer<T, S>(region_, address_); }

 private:
  const Region* region_;
  T* address_;
};

template <typename T, Space S>
class pointer {
 public:
  pointer() : region_(nullptr), address_(nullptr) {}
  pointer(std::nullptr_t) : pointer() {}
  pointer(const Region* region, T* address) : region_(region), address_(address) {}
  // T* to const T* happens by itself; any other cast has to be written, and never changes the address space.
  template <typename U, typename = std::enable_if_t<std::is_same_v<const U, T>>>
  pointer(const pointer<U, S>& other) : region_(other.region()), address_(other.address()) {}
  template <
      typename U, typename = std::enable_if_t<!std::is_same_v<const U, T> && !std::is_same_v<U, T>>, typename = void>
  explicit pointer(const pointer<U, S>& other) : region_(other.region()), address_((T*)(other.address())) {
    static_assert(std::is_const_v<T> || !std::is_const_v<U>, "a cast drops const");
  }
  reference<T, S> operator*() const { return {region_, address_}; }
  template <typename I>
  reference<T, S> operator[](I index) const {
    return {region_, address_ + index};
  }
  template <typename I>
  pointer operator+(I offset) const {
    return {region_, address_ + offset};
  }
  template <typename I>
  pointer operator-(I offset) const {
    return {region_, address_ - offset};
  }
  template <typename I>
  pointer& operator+=(I offset) {
    address_ += offset;
    return *this;
  }
  template <typename I>
  pointer& operator-=(I offset) {
    address_ -= offset;
    return *this;
  }
  pointer& operator++() { return *this += 1; }
  // A struct is read as a whole.
  T* operator->() const {
    emulator::emulator_load(region_, address_, sizeof(T), false);
    return address_;
  }
  const Region* region() const { return region_; }
  T* address() const { return address_; }

 private:
  const Region* region_;
  T* address_;
};

template <typename T>
using device_pointer = pointer<T, Space::device>;
template <typename T>
using constant_pointer = pointer<T, Space::constant>;
template <typename T>
using threadgroup_pointer = pointer<T, Space::threadgroup>;

// A threadgroup array. One threadgroup runs at a time, so a static serves all its threads.
template <typename T, size_t N>
class threadgroup_array {
 public:
  threadgroup_array(const char* name, Region** list) {
    region_ = Region{storage_, sizeof(storage_), Space::threadgroup, true, name, nullptr, nullptr, nullptr};
    emulator::emulator_register_array(&region_, list);
  }
  pointer<T, Space::threadgroup> begin() const { return {&region_, reinterpret_cast<T*>(const_cast<char*>(storage_))}; }

 private:
  alignas(16) char storage_[N * sizeof(T)];
  Region region_;
};

// ---------------------------------------------------------------------------------------------------- maths

template <typename T>
T min(T a, T b) { return b < a ? b : a; }
template <typename T>
T max(T a, T b) { return a < b ? b : a; }
template <typename T>
T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <typename T>
T select(T if_false, T if_true, bool condition) { return condition ? if_true : if_false; }
inline int abs(int x) { return x < 0 ? -x : x; }
inline float abs(float x) { return fabsf(x); }
inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
#define MLXLM_MATHS(NAME, F) \
  inline float NAME(float x) { return F(x); }
#define MLXLM_ALL_MATHS       \
  MLXLM_MATHS(exp, expf)      \
  MLXLM_MATHS(exp2, exp2f)    \
  MLXLM_MATHS(log, logf)      \
  MLXLM_MATHS(log2, log2f)    \
  MLXLM_MATHS(tanh, tanhf)    \
  MLXLM_MATHS(cos, cosf)      \
  MLXLM_MATHS(sin, sinf)      \
  MLXLM_MATHS(sqrt, sqrtf)    \
  MLXLM_MATHS(fabs, fabsf)    \
  MLXLM_MATHS(floor, floorf)  \
  MLXLM_MATHS(ceil, ceilf)
MLXLM_ALL_MATHS
inline float rsqrt(float x) { return 1.0f / sqrtf(x); }
inline bool isinf(float x) { return std::isinf(x); }
inline bool isnan(float x) { return std::isnan(x); }
namespace fast {
MLXLM_ALL_MATHS
}
namespace precise {
MLXLM_ALL_MATHS
}
#undef MLXLM_ALL_MATHS
#undef MLXLM_MATHS
inline int popcount(uint x) { return __builtin_popcount(x); }
inline int ctz(uint x) { return x ? __builtin_ctz(x) : 32; }

template <typename T>
struct numeric_limits : std::numeric_limits<T> {};

template <typename To, typename From>
To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different size");
  To result;
  memcpy(static_cast<void*>(&result), &value, sizeof(To));
  return result;
}

}  // namespace metal

#include "simdgroup.hpp"

using metal::bfloat;
using metal::half;
typedef half float16_t;
typedef bfloat bfloat16_t;

// Words of Metal that C++ would take as names, and a type that Metal does not have.
#pragma GCC poison vertex fragment kernel double
