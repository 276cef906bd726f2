// Declarations for the address-space check: clang's C++ for OpenCL has the same four memories as Metal and the same
// rules, so it rejects a pointer that loses or changes its space, and a threadgroup array outside of a kernel.
// Nothing here is ever run. `double` does not exist, as in Metal.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define METAL_FUNC inline __attribute__((always_inline))

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;

#undef INFINITY
#define INFINITY __builtin_inff()

namespace metal {

template <typename T, int N>
struct vec;
template <typename T>
struct vec<T, 2> {
  T x, y;
  vec() = default;
  vec(T all) : x(all), y(all) {}
  vec(T a, T b) : x(a), y(b) {}
  T __private& operator[](int i) __private { return i == 0 ? x : y; }
  T operator[](int i) const { return i == 0 ? x : y; }
};
template <typename T>
vec<T, 2> operator*(vec<T, 2> a, T b) { return vec<T, 2>(a.x * b, a.y * b); }

struct bfloat {
  unsigned short bits;
  bfloat() = default;
  explicit bfloat(float);
  operator float() const;
};

enum class mem_flags { mem_none, mem_device, mem_threadgroup, mem_device_and_threadgroup };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

template <typename T> T min(T a, T b);
template <typename T> T max(T a, T b);
template <typename T> T clamp(T x, T low, T high);
int abs(int);
float abs(float);
float log2(float);
float exp2(float);
float exp(float);
float rsqrt(float);
bool isinf(float);
namespace fast { float exp2(float); }
namespace precise { float tanh(float); float cos(float); float sin(float); }
template <typename T> T simd_shuffle_xor(T, ushort);
template <typename To, typename From> To as_type(From);
template <typename T> T simd_sum(T);
template <typename T> T simd_max(T);
template <typename T> T simd_min(T);

template <typename T, int Rows, int Columns>
struct simdgroup_matrix {
  vec<T, 2> elements;
  vec<T, 2> __private& thread_elements() __private { return elements; }
};
template <typename R, typename A, typename B, typename C>
void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<R, 8, 8>& d, thread simdgroup_matrix<A, 8, 8>& a, thread simdgroup_matrix<B, 8, 8>& b,
    thread simdgroup_matrix<C, 8, 8>& c);

// In front of OpenCL's own built-in vectors of these names.
typedef vec<float, 2> float2;
typedef vec<int, 2> int2;

}  // namespace metal

typedef half float16_t;
typedef metal::bfloat bfloat16_t;

#pragma clang poison vertex fragment  // words of Metal; OpenCL has `kernel` itself
