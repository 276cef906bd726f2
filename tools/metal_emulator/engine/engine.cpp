// See engine.hpp. Built once into a shared library that all emulated kernels use.
#include "engine.hpp"
#include "fibers.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace emulator {

enum class Status : uint8_t { ready, waiting_simdgroup, waiting_threadgroup, finished };

struct Fiber {
  void* stack_pointer;
  Status status;
  uint16_t index;  // in the threadgroup
  Builtins builtins;
};

struct Simdgroup {
  unsigned lanes, alive, arrived, at_barrier;
  uint32_t epoch;  // advanced by a barrier of the simdgroup that orders threadgroup memory
  Perform perform;
  int line;
  void* slots[kLanes];
};

// The shadow of two bytes of threadgroup memory: who wrote and who read them since the last barrier.
struct Cell {
  uint32_t write_epoch, write_simd_epoch;
  uint32_t read_epoch, read_simd_epoch;
  int16_t writer, reader;  // thread; kEveryLane for a collective access or several readers
  int16_t write_group, read_group;
  bool written;
};
constexpr int16_t kEveryLane = -1, kManyGroups = -2;

struct Machine {
  const Dispatch* dispatch;
  Counters* counters;
  char* message;
  size_t message_bytes;
  bool failed;
  char* stacks;
  void* scheduler;  // its stack pointer while a fiber runs
  Fiber fibers[kMaxThreads];
  Simdgroup groups[kMaxThreads / kLanes];
  unsigned thread_count, group_count, alive, at_barrier;
  int barrier_line;
  bool barrier_orders;
  uint32_t epoch;  // advanced by every barrier of the threadgroup that orders threadgroup memory
  uint32_t first_thread;  // index in the grid of the threadgroup's first thread
  Fiber* current;
  uint64_t random;
  std::vector<Region> regions;
  std::vector<Region*> region_pointers;
};

static Machine machine;

static uint32_t next_random() {  // xorshift64*
  machine.random ^= machine.random >> 12;
  machine.random ^= machine.random << 25;
  machine.random ^= machine.random >> 27;
  return uint32_t((machine.random * 0x2545F4914F6CDD1DULL) >> 32);
}

static void report(const char* format, ...) {
  if (machine.failed) return;
  machine.failed = true;
  va_list list;
  va_start(list, format);
  vsnprintf(machine.message, machine.message_bytes, format, list);
  va_end(list);
}

static void leave_fiber() { emulator_switch(&machine.current->stack_pointer, machine.scheduler); }

// Reports from inside a fiber: the dispatch ends, the fiber is never resumed.
#define FAIL(...)        \
  do {                   \
    report(__VA_ARGS__); \
    leave_fiber();       \
    __builtin_trap();    \
  } while (0)

static void where(char* text, size_t bytes) {
  const Builtins& b = machine.current->builtins;
  snprintf(text, bytes, "threadgroup (%u, %u, %u), thread %u", b.threadgroup_position_in_grid[0],
           b.threadgroup_position_in_grid[1], b.threadgroup_position_in_grid[2], b.thread_index_in_threadgroup);
}

static void run_kernel() {
  machine.dispatch->entry(machine.region_pointers.data(), machine.current->builtins);
  machine.current->status = Status::finished;
  --machine.alive;
  --machine.groups[machine.current->index / kLanes].alive;
  leave_fiber();
  __builtin_trap();
}

// ---------------------------------------------------------------------------------------------------- memory

static const char* name_of(Space space) {
  return space == Space::device ? "device" : space == Space::constant ? "constant" : "threadgroup";
}

static bool inside(const Region* region, const void* address, size_t bytes) {
  const char* p = static_cast<const char*>(address);
  return p >= region->base && p + bytes <= region->base + region->bytes;
}

[[noreturn]] static void fail_bounds(const Region* region, const void* address, size_t bytes, const char* what) {
  char place[96];
  where(place, sizeof place);
  FAIL("out of bounds: %s of %zu bytes at byte %td of %s array '%s' of %zu bytes (%s)", what, bytes,
       static_cast<const char*>(address) - region->base, name_of(region->space), region->name, region->bytes, place);
}

[[noreturn]] static void fail_race(const Region* region, const void* address, const char* what) {
  char place[96];
  where(place, sizeof place);
  FAIL("data race: %s at byte %td of threadgroup array '%s' with no barrier in between (%s)", what,
       static_cast<const char*>(address) - region->base, region->name, place);
}

// Whether an earlier access is ordered before one of the current thread.
static bool ordered(uint32_t epoch, int16_t group, uint32_t simd_epoch, int16_t thread, bool collective) {
  if (epoch != machine.epoch) return true;
  if (group == kManyGroups) return false;
  const int16_t mine = int16_t(machine.current->index / kLanes);
  if (group != mine) return false;
  if (simd_epoch != machine.groups[mine].epoch) return true;
  return !collective && thread == int16_t(machine.current->index);
}

static void shadow_load(const Region* region, const void* address, size_t bytes, bool collective) {
  const int16_t group = int16_t(machine.current->index / kLanes);
  const uint32_t simd_epoch = machine.groups[group].epoch;
  const int16_t thread = collective ? kEveryLane : int16_t(machine.current->index);
  const size_t first = (static_cast<const char*>(address) - region->base) / 2;
  const size_t last = (static_cast<const char*>(address) - region->base + bytes - 1) / 2;
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = region->cells[i];
    if (!cell.written) {
      char place[96];
      where(place, sizeof place);
      FAIL("uninitialised: byte %zu of threadgroup array '%s' is read before anybody wrote it (%s)", i * 2,
           region->name, place);
    }
    if (!ordered(cell.write_epoch, cell.write_group, cell.write_simd_epoch, cell.writer, collective))
      fail_race(region, address, "a read after a write");
    if (cell.read_epoch != machine.epoch) {
      cell.read_epoch = machine.epoch;
      cell.read_group = group;
      cell.read_simd_epoch = simd_epoch;
      cell.reader = thread;
    } else if (cell.read_group != group) {
      cell.read_group = kManyGroups;
    } else if (cell.read_simd_epoch != simd_epoch) {
      cell.read_simd_epoch = simd_epoch;
      cell.reader = thread;
    } else if (cell.reader != thread) {
      cell.reader = kEveryLane;
    }
  }
}

static void shadow_store(const Region* region, const void* address, size_t bytes, bool collective) {
  const int16_t group = int16_t(machine.current->index / kLanes);
  const size_t first = (static_cast<const char*>(address) - region->base) / 2;
  const size_t last = (static_cast<const char*>(address) - region->base + bytes - 1) / 2;
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = region->cells[i];
    if (cell.written && !ordered(cell.write_epoch, cell.write_group, cell.write_simd_epoch, cell.writer, collective))
      fail_race(region, address, "a write after a write");
    if (!ordered(cell.read_epoch, cell.read_group, cell.read_simd_epoch, cell.reader, collective))
      fail_race(region, address, "a write after a read");
    cell.written = true;
    cell.write_epoch = machine.epoch;
    cell.write_group = group;
    cell.write_simd_epoch = machine.groups[group].epoch;
    cell.writer = collective ? kEveryLane : int16_t(machine.current->index);
  }
}

extern "C" void emulator_load(const Region* region, const void* address, size_t bytes, bool collective) {
  if (!region || !inside(region, address, bytes)) {
    if (!region) emulator_fail("a load through a pointer that points nowhere");
    fail_bounds(region, address, bytes, "a read");
  }
  switch (region->space) {
    case Space::device:
      machine.counters->device_bytes_read += bytes;
      break;
    case Space::constant:
      machine.counters->constant_bytes_read += bytes;
      break;
    case Space::threadgroup:
      machine.counters->threadgroup_bytes_read += bytes;
      shadow_load(region, address, bytes, collective);
  }
}

extern "C" void emulator_store(const Region* region, const void* address, size_t bytes, bool collective) {
  if (!region) emulator_fail("a store through a pointer that points nowhere");
  if (!inside(region, address, bytes)) fail_bounds(region, address, bytes, "a write");
  if (region->space == Space::threadgroup) {
    machine.counters->threadgroup_bytes_written += bytes;
    return shadow_store(region, address, bytes, collective);
  }
  char place[96];
  if (!region->writable) {
    where(place, sizeof place);
    FAIL("a write to the input '%s' (%s)", region->name, place);
  }
  machine.counters->device_bytes_written += bytes;
  const uint32_t me = machine.first_thread + machine.current->index + 1;
  const size_t first = static_cast<const char*>(address) - region->base;
  for (size_t i = first; i < first + bytes; ++i) {
    if (region->owners[i] != 0 && region->owners[i] != me) {
      where(place, sizeof place);
      FAIL("two writers: byte %zu of output '%s' was already written by another thread (%s)", i, region->name, place);
    }
    region->owners[i] = me;
  }
}

extern "C" void emulator_register_array(Region* region, Region** list) {
  const size_t cells = (region->bytes + 1) / 2;
  region->cells = static_cast<Cell*>(calloc(cells, sizeof(Cell)));
  region->next = *list;
  *list = region;
  memset(region->base, 0xFF, region->bytes);  // NaN in every float format
}

extern "C" void emulator_fail(const char* message) {
  char place[96];
  where(place, sizeof place);
  FAIL("%s (%s)", message, place);
}

extern "C" unsigned emulator_lane() { return machine.current->index % kLanes; }

extern "C" void emulator_count_matrix_operation() { ++machine.counters->matrix_operations; }

// ------------------------------------------------------------------------------- barriers and rendezvous

static void wake(unsigned group) {
  Simdgroup& g = machine.groups[group];
  g.arrived = g.at_barrier = 0;
  for (unsigned i = 0; i < g.lanes; ++i) {
    Fiber& fiber = machine.fibers[group * kLanes + i];
    if (fiber.status == Status::waiting_simdgroup) fiber.status = Status::ready;
  }
}

static void join_simdgroup(Perform perform, void* mine, int line) {
  Fiber* fiber = machine.current;
  const unsigned group = fiber->index / kLanes;
  Simdgroup& g = machine.groups[group];
  char place[96];
  if (g.alive != g.lanes) {
    where(place, sizeof place);
    FAIL("divergent: a simdgroup operation at line %d after %u of its lanes have returned (%s)", line,
         g.lanes - g.alive, place);
  }
  if (g.arrived == 0) {
    g.perform = perform;
    g.line = line;
  } else if (g.perform != perform || g.line != line) {
    where(place, sizeof place);
    FAIL("divergent: lanes of one simdgroup meet in different operations, at lines %d and %d (%s)", g.line, line,
         place);
  }
  g.slots[fiber->index % kLanes] = mine;
  if (++g.arrived < g.lanes) {
    fiber->status = Status::waiting_simdgroup;
    leave_fiber();
    return;
  }
  if (g.lanes == kLanes) perform(g.slots);
  else FAIL("a simdgroup operation in a simdgroup of %u lanes", g.lanes);
  wake(group);
}

extern "C" void emulator_rendezvous(Perform perform, void* mine, int line) {
  const unsigned group = machine.current->index / kLanes;
  if (machine.groups[group].arrived == 0) ++machine.counters->simdgroup_operations;
  join_simdgroup(perform, mine, line);
}

static void simdgroup_barrier_silent(void* const*) {}
static void simdgroup_barrier_ordering(void* const*) {
  ++machine.groups[machine.current->index / kLanes].epoch;
}

extern "C" void emulator_simdgroup_barrier(bool orders, int line) {
  const unsigned group = machine.current->index / kLanes;
  if (machine.groups[group].arrived == 0) ++machine.counters->simdgroup_barriers;
  join_simdgroup(orders ? simdgroup_barrier_ordering : simdgroup_barrier_silent, nullptr, line);
}

extern "C" void emulator_threadgroup_barrier(bool orders, int line) {
  Fiber* fiber = machine.current;
  char place[96];
  if (machine.alive != machine.thread_count) {
    where(place, sizeof place);
    FAIL("divergent: a threadgroup barrier at line %d after %u threads have returned (%s)", line,
         machine.thread_count - machine.alive, place);
  }
  if (machine.at_barrier == 0) {
    machine.barrier_line = line;
    machine.barrier_orders = orders;
  } else if (machine.barrier_line != line) {
    where(place, sizeof place);
    FAIL("divergent: threads of one threadgroup wait at different barriers, at lines %d and %d (%s)",
         machine.barrier_line, line, place);
  }
  ++machine.at_barrier;
  fiber->status = Status::waiting_threadgroup;
  leave_fiber();  // the scheduler opens the barrier when all have arrived
}

static void shuffle(unsigned* items, unsigned count) {
  for (unsigned i = count; i > 1; --i) {
    const unsigned j = next_random() % i;
    const unsigned swapped = items[i - 1];
    items[i - 1] = items[j];
    items[j] = swapped;
  }
}

static void open_barrier() {
  machine.at_barrier = 0;
  ++machine.counters->threadgroup_barriers;
  if (machine.barrier_orders) ++machine.epoch;
  for (unsigned i = 0; i < machine.thread_count; ++i) machine.fibers[i].status = Status::ready;
}

// Runs the lanes of a simdgroup until each is finished or waits for other simdgroups. False when they are stuck.
static bool run_simdgroup(unsigned group) {
  Simdgroup& g = machine.groups[group];
  for (bool ran = true; ran;) {
    ran = false;
    const unsigned start = next_random() % g.lanes;  // which lane goes first
    for (unsigned n = 0; n < g.lanes; ++n) {
      Fiber& fiber = machine.fibers[group * kLanes + (start + n) % g.lanes];
      if (fiber.status != Status::ready) continue;
      machine.current = &fiber;
      emulator_switch(&machine.scheduler, fiber.stack_pointer);
      if (machine.failed) return false;
      ran = true;
    }
  }
  return g.arrived == 0;
}

static void run_threadgroup() {
  unsigned order[kMaxThreads / kLanes];
  for (unsigned i = 0; i < machine.group_count; ++i) order[i] = i;
  while (machine.alive > 0) {
    shuffle(order, machine.group_count);
    for (unsigned i = 0; i < machine.group_count; ++i) {
      const unsigned group = order[i];
      if (run_simdgroup(group)) continue;
      if (machine.failed) return;
      return report(
          "divergent: in simdgroup %u, %u lanes wait for a simdgroup operation at line %d and the others for a barrier",
          group, machine.groups[group].arrived, machine.groups[group].line);
    }
    if (machine.alive == 0) return;
    if (machine.at_barrier == machine.thread_count) {
      open_barrier();
    } else {
      return report("divergent: %u of %u threads wait at the threadgroup barrier at line %d, the others have returned",
                    machine.at_barrier, machine.thread_count, machine.barrier_line);
    }
  }
}

static void start_threadgroup(const uint32_t* position, const uint32_t* groups) {
  const Dispatch& d = *machine.dispatch;
  ++machine.counters->threadgroups;
  ++machine.epoch;
  for (Region* array = *d.arrays; array; array = array->next) {
    memset(array->base, 0xFF, array->bytes);
    memset(array->cells, 0, (array->bytes + 1) / 2 * sizeof(Cell));
  }
  machine.alive = machine.thread_count;
  machine.at_barrier = 0;
  for (unsigned i = 0; i < machine.group_count; ++i) {
    const unsigned rest = machine.thread_count - i * kLanes;
    machine.groups[i] = Simdgroup{};
    machine.groups[i].lanes = machine.groups[i].alive = rest < kLanes ? rest : kLanes;
  }
  for (unsigned i = 0; i < machine.thread_count; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.index = uint16_t(i);
    fiber.status = Status::ready;
    char* stack = machine.stacks + i * kStackBytes;
    fiber.stack_pointer = prepare_stack(stack + kStackBytes, run_kernel);
    Builtins& b = fiber.builtins;
    const uint32_t local[3] = {i % d.threadgroup[0], i / d.threadgroup[0] % d.threadgroup[1],
                               i / d.threadgroup[0] / d.threadgroup[1]};
    for (int a = 0; a < 3; ++a) {
      b.thread_position_in_threadgroup[a] = local[a];
      b.threadgroup_position_in_grid[a] = position[a];
      b.thread_position_in_grid[a] = position[a] * d.threadgroup[a] + local[a];
      b.threadgroups_per_grid[a] = groups[a];
      b.threads_per_threadgroup[a] = d.threadgroup[a];
      b.threads_per_grid[a] = d.grid[a];
    }
    b.thread_index_in_threadgroup = i;
    b.simdgroup_index_in_threadgroup = i / kLanes;
    b.thread_index_in_simdgroup = i % kLanes;
    b.simdgroups_per_threadgroup = machine.group_count;
    b.threads_per_simdgroup = kLanes;
  }
}

static bool prepare(const Dispatch& d) {
  machine.thread_count = d.threadgroup[0] * d.threadgroup[1] * d.threadgroup[2];
  if (machine.thread_count == 0 || machine.thread_count > kMaxThreads) {
    report("a threadgroup of %u threads; expected 1 to %u", machine.thread_count, kMaxThreads);
    return false;
  }
  for (int a = 0; a < 3; ++a) {
    if (d.grid[a] % d.threadgroup[a] != 0) {
      report("axis %d of the grid has %u threads, not a multiple of the threadgroup's %u", a, d.grid[a],
             d.threadgroup[a]);
      return false;
    }
  }
  machine.group_count = (machine.thread_count + kLanes - 1) / kLanes;
  if (!machine.stacks) {
    void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      report("no memory for the stacks of the emulated threads");
      return false;
    }
    machine.stacks = static_cast<char*>(memory);
    for (unsigned i = 0; i < kMaxThreads; ++i)  // running over the end of a stack stops the process
      mprotect(machine.stacks + i * kStackBytes, size_t(sysconf(_SC_PAGESIZE)), PROT_NONE);
  }
  machine.regions.clear();
  machine.region_pointers.clear();
  for (uint32_t i = 0; i < d.argument_count; ++i) {
    const Argument& a = d.arguments[i];
    uint32_t* owners = a.writable ? static_cast<uint32_t*>(calloc(a.bytes + 1, sizeof(uint32_t))) : nullptr;
    if (a.writable) memset(a.data, 0xFF, a.bytes);
    machine.regions.push_back({static_cast<char*>(a.data), size_t(a.bytes), Space(a.space), a.writable != 0, a.name,
                               nullptr, owners, nullptr});
  }
  for (Region& region : machine.regions) machine.region_pointers.push_back(&region);
  return true;
}

static void run_dispatch(const Dispatch& d) {
  uint32_t groups[3];
  for (int a = 0; a < 3; ++a) groups[a] = d.grid[a] / d.threadgroup[a];
  const uint64_t total = uint64_t(groups[0]) * groups[1] * groups[2];
  for (uint64_t i = 0; i < total && !machine.failed; ++i) {
    const uint32_t position[3] = {uint32_t(i % groups[0]), uint32_t(i / groups[0] % groups[1]),
                                  uint32_t(i / groups[0] / groups[1])};
    machine.first_thread = uint32_t(i) * machine.thread_count;
    start_threadgroup(position, groups);
    run_threadgroup();
  }
  uint64_t memory = 0;
  for (Region* array = *d.arrays; array; array = array->next) memory += array->bytes;
  machine.counters->threadgroup_memory = memory;
  if (!machine.failed && memory > d.threadgroup_memory_limit)
    report("the threadgroup arrays take %llu bytes; a threadgroup has %u", static_cast<unsigned long long>(memory),
           d.threadgroup_memory_limit);
}

// Runs one dispatch. Returns 0, or 1 with what went wrong in `message`. Not for several threads at once.
extern "C" int emulator_dispatch(const Dispatch* dispatch, Counters* counters, char* message, size_t message_bytes) {
  machine.dispatch = dispatch;
  machine.counters = counters;
  machine.message = message;
  machine.message_bytes = message_bytes;
  machine.failed = false;
  machine.random = 0x9E3779B97F4A7C15ULL ^ (uint64_t(dispatch->seed) << 17 | 1);
  if (prepare(*dispatch)) run_dispatch(*dispatch);
  for (Region& region : machine.regions) free(region.owners);
  machine.regions.clear();
  return machine.failed ? 1 : 0;
}

}  // namespace emulator
