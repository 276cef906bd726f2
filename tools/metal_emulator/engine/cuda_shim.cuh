// A small metal_stdlib for CUDA: the text of a Metal kernel, less its address spaces, runs on an NVIDIA GPU.
// A simdgroup is a warp; simdgroup_matrix keeps Apple's lane map and multiplies through shuffles.
#pragma once

#include <cmath>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define METAL_FUNC __device__ __forceinline__

using uint = unsigned int;
using ushort = unsigned short;

namespace metal {

#define MLXLM_DEVICE __device__ __forceinline__

struct half {
  unsigned short bits;
  half() = default;
  MLXLM_DEVICE half(float value) : bits(__half_as_ushort(__float2half_rn(value))) {}
  MLXLM_DEVICE operator float() const { return __half2float(__ushort_as_half(bits)); }
};
struct bfloat {
  unsigned short bits;
  bfloat() = default;
  MLXLM_DEVICE explicit bfloat(float value) : bits(__bfloat16_as_ushort(__float2bfloat16_rn(value))) {}
  MLXLM_DEVICE operator float() const { return __bfloat162float(__ushort_as_bfloat16(bits)); }
};
typedef half float16_t;
typedef bfloat bfloat16_t;

template <typename T, int N>
struct vec;
template <typename T>
struct vec<T, 2> {
  T x, y;
  vec() = default;
  MLXLM_DEVICE vec(T all) : x(all), y(all) {}
  MLXLM_DEVICE vec(T a, T b) : x(a), y(b) {}
  MLXLM_DEVICE T& operator[](int i) { return i == 0 ? x : y; }
  MLXLM_DEVICE T operator[](int i) const { return i == 0 ? x : y; }
};
template <typename T>
struct vec<T, 3> {
  T x, y, z;
};
template <typename T>
MLXLM_DEVICE vec<T, 2> operator*(vec<T, 2> a, T b) { return vec<T, 2>(a.x * b, a.y * b); }
using float2 = vec<float, 2>;
using int2 = vec<int, 2>;
using uint3 = vec<uint, 3>;

template <typename T>
MLXLM_DEVICE T min(T a, T b) { return b < a ? b : a; }
template <typename T>
MLXLM_DEVICE T max(T a, T b) { return a < b ? b : a; }
template <typename T>
MLXLM_DEVICE T clamp(T x, T low, T high) { return min(max(x, low), high); }
MLXLM_DEVICE int abs(int x) { return x < 0 ? -x : x; }
MLXLM_DEVICE float abs(float x) { return fabsf(x); }
MLXLM_DEVICE float log2(float x) { return log2f(x); }
MLXLM_DEVICE bool isinf(float x) { return ::isinf(x); }
namespace fast {
MLXLM_DEVICE float exp2(float x) { return exp2f(x); }
}
namespace precise {
MLXLM_DEVICE float tanh(float x) { return tanhf(x); }
MLXLM_DEVICE float cos(float x) { return cosf(x); }
MLXLM_DEVICE float sin(float x) { return sinf(x); }
}

enum class mem_flags { mem_none, mem_device, mem_threadgroup, mem_device_and_threadgroup };
MLXLM_DEVICE void threadgroup_barrier(mem_flags) { __syncthreads(); }
MLXLM_DEVICE void simdgroup_barrier(mem_flags) { __syncwarp(); }

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
template <typename T>
MLXLM_DEVICE T simd_shuffle_xor(T value, ushort mask) { return __shfl_xor_sync(kAllLanes, value, mask); }
template <typename T>
MLXLM_DEVICE T simd_sum(T value) {
  for (int step = 1; step < 32; step *= 2) value += simd_shuffle_xor(value, ushort(step));
  return value;
}

template <typename T, int Rows, int Columns>
class simdgroup_matrix {
 public:
  simdgroup_matrix() = default;
  MLXLM_DEVICE vec<T, 2>& thread_elements() { return elements_; }

 private:
  vec<T, 2> elements_;
};

// Lane l holds (row, column) and (row, column + 1) of an 8 x 8 matrix; this is who holds (row, column).
MLXLM_DEVICE int lane_of(int row, int column) {
  return (row & 4) * 4 + (row & 3) * 2 + (column & 4) * 2 + (column & 2) / 2;
}
MLXLM_DEVICE void simdgroup_multiply_accumulate(
    simdgroup_matrix<float, 8, 8>& d, simdgroup_matrix<float, 8, 8>& a, simdgroup_matrix<float, 8, 8>& b,
    simdgroup_matrix<float, 8, 8>& c) {
  const int lane = int(threadIdx.x) % 32;
  const int row = ((lane / 4) & 4) + (lane / 2) % 4;
  const int column = ((lane / 4) & 2) * 2 + (lane % 2) * 2;
  vec<float, 2> sum = c.thread_elements();
  for (int k = 0; k < 8; ++k) {
    const int left = lane_of(row, k);
    const float a_x = __shfl_sync(kAllLanes, a.thread_elements().x, left);
    const float a_y = __shfl_sync(kAllLanes, a.thread_elements().y, left);
    const float a_k = k % 2 == 0 ? a_x : a_y;
    const int right = lane_of(k, column);
    sum.x += a_k * __shfl_sync(kAllLanes, b.thread_elements().x, right);
    sum.y += a_k * __shfl_sync(kAllLanes, b.thread_elements().y, right);
  }
  d.thread_elements() = sum;
}

MLXLM_DEVICE uint3 of(dim3 d) { return uint3{d.x, d.y, d.z}; }
MLXLM_DEVICE uint3 of(::uint3 d) { return uint3{d.x, d.y, d.z}; }
MLXLM_DEVICE uint3 builtin_threadgroup_position_in_grid() { return of(blockIdx); }
MLXLM_DEVICE uint3 builtin_threadgroups_per_grid() { return of(gridDim); }
MLXLM_DEVICE uint3 builtin_thread_position_in_threadgroup() { return of(threadIdx); }
MLXLM_DEVICE uint3 builtin_threads_per_threadgroup() { return of(blockDim); }
MLXLM_DEVICE uint builtin_thread_index_in_threadgroup() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
MLXLM_DEVICE uint builtin_simdgroup_index_in_threadgroup() { return builtin_thread_index_in_threadgroup() / 32; }
MLXLM_DEVICE uint builtin_thread_index_in_simdgroup() { return builtin_thread_index_in_threadgroup() % 32; }

}  // namespace metal
