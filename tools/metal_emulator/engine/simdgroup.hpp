// Part of the metal_stdlib shim: barriers, operations of a simdgroup, and its 8 x 8 matrices.
#pragma once

namespace metal {

// ---------------------------------------------------------------------------- barriers, simdgroup operations

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_device_and_threadgroup = 3 };
inline bool orders_threadgroup(mem_flags flags) { return (int(flags) & 2) != 0; }
inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  emulator::emulator_threadgroup_barrier(orders_threadgroup(flags), line);
}
inline void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  emulator::emulator_simdgroup_barrier(orders_threadgroup(flags), line);
}

constexpr int kLanes = emulator::kLanes;

// What a lane brings to a meeting of its simdgroup, and what it takes away.
template <typename T>
struct Exchange {
  T value;
  uint argument;
  T result;
};

template <typename T, typename Pick>
void pick_lane(void* const* lanes) {
  for (int i = 0; i < kLanes; ++i) {
    auto* mine = static_cast<Exchange<T>*>(lanes[i]);
    const uint source = Pick::lane(uint(i), mine->argument);
    if (source < uint(kLanes)) mine->result = static_cast<Exchange<T>*>(lanes[source])->value;
  }
}
template <typename T, typename Fold>
void fold_lanes(void* const* lanes) {  // pairwise, as hardware does, so that the order is the same for every lane
  T values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = static_cast<Exchange<T>*>(lanes[i])->value;
  for (int step = 1; step < kLanes; step *= 2)
    for (int i = 0; i < kLanes; i += 2 * step) values[i] = Fold::fold(values[i], values[i + step]);
  for (int i = 0; i < kLanes; ++i) static_cast<Exchange<T>*>(lanes[i])->result = values[0];
}
struct PickXor { static uint lane(uint me, uint mask) { return me ^ mask; } };
struct PickOne { static uint lane(uint, uint which) { return which; } };
struct PickDown { static uint lane(uint me, uint delta) { return me + delta; } };
struct PickUp { static uint lane(uint me, uint delta) { return me - delta; } };
struct FoldSum { template <typename T> static T fold(T a, T b) { return a + b; } };
struct FoldMax { template <typename T> static T fold(T a, T b) { return a < b ? b : a; } };
struct FoldMin { template <typename T> static T fold(T a, T b) { return b < a ? b : a; } };
struct FoldOr { template <typename T> static T fold(T a, T b) { return a | b; } };
struct FoldAnd { template <typename T> static T fold(T a, T b) { return a & b; } };

template <typename T>
T meet(emulator::Perform perform, T value, uint argument, int line) {
  Exchange<T> mine{value, argument, value};
  emulator::emulator_rendezvous(perform, &mine, line);
  return mine.result;
}
#define MLXLM_PICK(NAME, PICK)                                           \
  template <typename T>                                                  \
  T NAME(T value, ushort argument, int line = __builtin_LINE()) {        \
    return meet<T>(pick_lane<T, PICK>, value, argument, line);           \
  }
MLXLM_PICK(simd_shuffle_xor, PickXor)
MLXLM_PICK(simd_shuffle, PickOne)
MLXLM_PICK(simd_broadcast, PickOne)
MLXLM_PICK(simd_shuffle_down, PickDown)
MLXLM_PICK(simd_shuffle_up, PickUp)
#undef MLXLM_PICK
#define MLXLM_FOLD(NAME, FOLD)                                \
  template <typename T>                                       \
  T NAME(T value, int line = __builtin_LINE()) {              \
    return meet<T>(fold_lanes<T, FOLD>, value, 0, line);      \
  }
MLXLM_FOLD(simd_sum, FoldSum)
MLXLM_FOLD(simd_max, FoldMax)
MLXLM_FOLD(simd_min, FoldMin)
MLXLM_FOLD(simd_or, FoldOr)
MLXLM_FOLD(simd_and, FoldAnd)
#undef MLXLM_FOLD
inline bool simd_any(bool value, int line = __builtin_LINE()) {
  return meet<int>(fold_lanes<int, FoldOr>, value, 0, line) != 0;
}
inline bool simd_all(bool value, int line = __builtin_LINE()) {
  return meet<int>(fold_lanes<int, FoldAnd>, value, 0, line) != 0;
}

// ------------------------------------------------------------------------------------------ simdgroup_matrix

// Apple's lane map: lane l holds (row, column) and (row, column + 1) of an 8 x 8 matrix.
inline int matrix_row(int lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
inline int matrix_column(int lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }

template <typename T, int Rows = 8, int Columns = 8>
class simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "Metal has 8 x 8 simdgroup matrices only");

 public:
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    const int lane = int(emulator::emulator_lane()), row = matrix_row(lane), column = matrix_column(lane);
    elements_.x = row == column ? diagonal : T(0.0f);
    elements_.y = row == column + 1 ? diagonal : T(0.0f);
  }
  vec<T, 2>& thread_elements() { return elements_; }
  const vec<T, 2>& thread_elements() const { return elements_; }

 private:
  vec<T, 2> elements_;
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;

template <typename T>
simdgroup_matrix<T, 8, 8> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, 8, 8> result;
  result.thread_elements() = vec<T, 2>(value);
  return result;
}

struct MatrixExchange {
  float a[2], b[2], c[2], result[2];
};
inline void multiply_lanes(void* const* lanes) {
  float a[8][8], b[8][8];
  for (int i = 0; i < kLanes; ++i) {
    const auto* mine = static_cast<const MatrixExchange*>(lanes[i]);
    const int row = matrix_row(i), column = matrix_column(i);
    for (int e = 0; e < 2; ++e) {
      a[row][column + e] = mine->a[e];
      b[row][column + e] = mine->b[e];
    }
  }
  for (int i = 0; i < kLanes; ++i) {
    auto* mine = static_cast<MatrixExchange*>(lanes[i]);
    const int row = matrix_row(i), column = matrix_column(i);
    for (int e = 0; e < 2; ++e) {
      float sum = mine->c[e];
      for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][column + e];
      mine->result[e] = sum;
    }
  }
  emulator::emulator_count_matrix_operation();
}
template <typename R, typename A, typename B, typename C>
void simdgroup_multiply_accumulate(simdgroup_matrix<R, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c,
                                   int line = __builtin_LINE()) {
  MatrixExchange mine;
  for (int e = 0; e < 2; ++e) {
    mine.a[e] = float(a.thread_elements()[e]);
    mine.b[e] = float(b.thread_elements()[e]);
    mine.c[e] = float(c.thread_elements()[e]);
  }
  emulator::emulator_rendezvous(multiply_lanes, &mine, line);
  for (int e = 0; e < 2; ++e) d.thread_elements()[e] = static_cast<R>(mine.result[e]);
}
template <typename R, typename A, typename B>
void simdgroup_multiply(simdgroup_matrix<R, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                        const simdgroup_matrix<B, 8, 8>& b, int line = __builtin_LINE()) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<R>(static_cast<R>(0.0f)), line);
}
inline void nothing(void* const*) {}
template <typename T, typename U, Space S>
void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, pointer<U, S> source, ulong elements_per_row = 8, int = 0,
                    bool transpose = false, int line = __builtin_LINE()) {
  emulator::emulator_rendezvous(nothing, nullptr, line);
  const int lane = int(emulator::emulator_lane());
  for (int e = 0; e < 2; ++e) {
    const int row = matrix_row(lane), column = matrix_column(lane) + e;
    const auto element = source + (transpose ? column * elements_per_row + row : row * elements_per_row + column);
    emulator::emulator_load(element.region(), element.address(), sizeof(U), S == Space::threadgroup);
    d.thread_elements()[e] = static_cast<T>(*element.address());
  }
}
template <typename T, Space S>
void simdgroup_store(const simdgroup_matrix<T, 8, 8>& source, pointer<T, S> target, ulong elements_per_row = 8, int = 0,
                     bool transpose = false, int line = __builtin_LINE()) {
  emulator::emulator_rendezvous(nothing, nullptr, line);
  const int lane = int(emulator::emulator_lane());
  for (int e = 0; e < 2; ++e) {
    const int row = matrix_row(lane), column = matrix_column(lane) + e;
    const auto element = target + (transpose ? column * elements_per_row + row : row * elements_per_row + column);
    emulator::emulator_store(element.region(), element.address(), sizeof(T), S == Space::threadgroup);
    *element.address() = source.thread_elements()[e];
  }
}

}  // namespace metal
