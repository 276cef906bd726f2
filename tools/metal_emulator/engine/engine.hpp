// The machine under an emulated kernel: memory regions with shadows, fibers, barriers, rendezvous, counters.
//
// One dispatch runs its threadgroups one after the other. Each thread of a threadgroup is a fiber that runs until
// it meets a barrier or an operation of its simdgroup, so the order between two such points is free, and the
// scheduler shuffles it. Every load and store goes through a Region, which knows its bounds and remembers enough
// about the last accesses to tell a data race, a read of memory that nobody wrote, or two writers of one output.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

enum class Space : int { device = 0, constant = 1, threadgroup = 2 };

constexpr unsigned kLanes = 32;         // threads of a simdgroup
constexpr unsigned kMaxThreads = 1024;  // threads of a threadgroup

struct Counters {
  uint64_t matrix_operations;  // 8x8x8 multiply-accumulates of a simdgroup
  uint64_t device_bytes_read;
  uint64_t device_bytes_written;
  uint64_t constant_bytes_read;
  uint64_t threadgroup_bytes_read;
  uint64_t threadgroup_bytes_written;
  uint64_t threadgroup_barriers;
  uint64_t simdgroup_barriers;
  uint64_t simdgroup_operations;  // shuffles, reductions and votes of a simdgroup
  uint64_t threadgroups;
  uint64_t threadgroup_memory;  // bytes of threadgroup arrays of the kernel
};

struct Cell;  // the shadow of two bytes of threadgroup memory

// A buffer argument or a threadgroup array.
struct Region {
  char* base;
  size_t bytes;
  Space space;
  bool writable;
  const char* name;
  Cell* cells;       // threadgroup memory: accesses since the last barrier, one cell for two bytes
  uint32_t* owners;  // writable buffers: 1 + the thread that wrote the byte, 0 when nobody did
  Region* next;      // the threadgroup arrays of a kernel form a list
};

struct Builtins {
  uint32_t thread_position_in_grid[3];
  uint32_t thread_position_in_threadgroup[3];
  uint32_t threadgroup_position_in_grid[3];
  uint32_t threadgroups_per_grid[3];
  uint32_t threads_per_threadgroup[3];
  uint32_t threads_per_grid[3];
  uint32_t thread_index_in_threadgroup;
  uint32_t simdgroup_index_in_threadgroup;
  uint32_t thread_index_in_simdgroup;
  uint32_t simdgroups_per_threadgroup;
  uint32_t threads_per_simdgroup;
};

using Perform = void (*)(void* const* lanes);

// Called by kernels. `collective` marks an access that a whole simdgroup makes together (simdgroup_load): which
// lane touches which element is the hardware's business, so it counts as one of every lane.
extern "C" {
void emulator_load(const Region* region, const void* address, size_t bytes, bool collective);
void emulator_store(const Region* region, const void* address, size_t bytes, bool collective);
// All lanes of the simdgroup meet here; the last one performs the operation on what all of them brought.
void emulator_rendezvous(Perform perform, void* mine, int line);
void emulator_threadgroup_barrier(bool orders_threadgroup_memory, int line);
void emulator_simdgroup_barrier(bool orders_threadgroup_memory, int line);
void emulator_count_matrix_operation();
void emulator_register_array(Region* region, Region** list);
unsigned emulator_lane();
[[noreturn]] void emulator_fail(const char* message);
}

using Entry = void (*)(Region* const* arguments, const Builtins& builtins);

struct Argument {
  void* data;
  uint64_t bytes;
  int32_t space;
  int32_t writable;
  const char* name;
};

struct Dispatch {
  Entry entry;
  Region** arrays;  // head of the kernel's list of threadgroup arrays
  const Argument* arguments;
  uint32_t argument_count;
  uint32_t grid[3];         // threads
  uint32_t threadgroup[3];  // threads
  uint32_t seed;
  uint32_t threadgroup_memory_limit;
};

}  // namespace emulator
