#include "scheduler.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <link.h>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fibers.h"
#include "memory.h"
#include "races.h"
#include "rendezvous.h"
#include "reports.h"

namespace emulator {

mtl_launch* launch = nullptr;
Group group;
Counters counters;
bool stopped = false;

static uintptr_t image_begin, image_end;
static std::vector<void*> arguments;
static std::mt19937 shuffler;

static int find_image(struct dl_phdr_info* image, size_t, void* address) {
  uintptr_t wanted = reinterpret_cast<uintptr_t>(address), begin = ~0ul, end = 0;
  for (int i = 0; i < image->dlpi_phnum; ++i) {
    const auto& segment = image->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    begin = std::min<uintptr_t>(begin, image->dlpi_addr + segment.p_vaddr);
    end = std::max<uintptr_t>(end, image->dlpi_addr + segment.p_vaddr + segment.p_memsz);
  }
  if (wanted < begin || wanted >= end) return 0;
  image_begin = begin;
  image_end = end;
  return 1;
}

bool in_kernel_image(uintptr_t address) { return address >= image_begin && address < image_end; }

void start_launch(mtl_launch* request) {
  launch = request;
  group = Group{};
  counters = Counters{};
  stopped = false;
  shuffler.seed(request->seed);
  dl_iterate_phdr(find_image, reinterpret_cast<void*>(request->entry));
  Dl_info information;
  request->image_base = 0;
  if (dladdr(reinterpret_cast<void*>(request->entry), &information))
    request->image_base = reinterpret_cast<uintptr_t>(information.dli_fbase);
  arguments.clear();
  for (int i = 0; i < request->buffer_count; ++i)
    arguments.push_back(reinterpret_cast<void*>(regions[i].begin + request->buffers[i].offset));
  reserve_fibers(request->threadgroup[0] * request->threadgroup[1] * request->threadgroup[2]);
}

void stop_kernel() {
  stopped = true;
  settle_collision();
  switch_to_scheduler();
  abort();
}

static void run_thread() {
  launch->entry(arguments.data(), &current->ids);
  current->state = State::done;
  settle_collision();
  switch_to_scheduler();
  abort();
}

static uint32_t groups_along(int axis) {
  return (launch->grid[axis] + launch->threadgroup[axis] - 1) / launch->threadgroup[axis];
}

// A ragged last threadgroup is smaller: threads beyond the grid do not exist (dispatchThreads).
static void fill_ids(Fiber& fiber, const uint32_t size[3]) {
  const uint32_t index = fiber.thread;
  const uint32_t position[3] = {index % size[0], index / size[0] % size[1], index / (size[0] * size[1])};
  mtl_ids& ids = fiber.ids;
  uint32_t whole = 1;
  for (int axis = 0; axis < 3; ++axis) {
    ids.thread_position_in_threadgroup[axis] = position[axis];
    ids.threadgroup_position_in_grid[axis] = group.position[axis];
    ids.thread_position_in_grid[axis] = group.position[axis] * launch->threadgroup[axis] + position[axis];
    ids.threads_per_grid[axis] = launch->grid[axis];
    ids.threads_per_threadgroup[axis] = size[axis];
    ids.dispatch_threads_per_threadgroup[axis] = launch->threadgroup[axis];
    ids.threadgroups_per_grid[axis] = groups_along(axis);
    ids.grid_origin[axis] = 0;
    whole *= launch->threadgroup[axis];
  }
  ids.thread_index_in_threadgroup = index;
  ids.thread_index_in_simdgroup = fiber.lane;
  ids.simdgroup_index_in_threadgroup = fiber.simdgroup;
  ids.simdgroups_per_threadgroup = group.simdgroups;
  ids.thread_index_in_quadgroup = index % 4;
  ids.quadgroup_index_in_threadgroup = index / 4;
  ids.quadgroups_per_threadgroup = (group.threads + 3) / 4;
  ids.dispatch_simdgroups_per_threadgroup = (whole + simd_width - 1) / simd_width;
  ids.dispatch_quadgroups_per_threadgroup = (whole + 3) / 4;
}

static void start_group(const uint32_t position[3]) {
  uint32_t size[3];
  for (int axis = 0; axis < 3; ++axis) {
    group.position[axis] = position[axis];
    size[axis] = std::min(launch->threadgroup[axis], launch->grid[axis] - position[axis] * launch->threadgroup[axis]);
  }
  ++group.number;
  group.threads = size[0] * size[1] * size[2];
  group.simdgroups = (group.threads + simd_width - 1) / simd_width;
  group.threadgroup_bytes = 0;
  for (int i = 0; i < group.threads; ++i) {
    prepare_fiber(fibers[i], i, run_thread);
    fill_ids(fibers[i], size);
  }
}

static std::vector<int> in_order(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (launch->order == MTL_REVERSE) std::reverse(order.begin(), order.end());
  return order;
}

// Runs one SIMD-group until all its threads wait at a threadgroup_barrier or are done. Whether anything ran.
static bool run_simdgroup(int simdgroup, const std::vector<int>& lanes) {
  bool progress = false;
  for (bool ran = true; ran;) {
    ran = false;
    for (int lane : lanes) {
      int index = simdgroup * simd_width + lane;
      if (index >= group.threads || fibers[index].state != State::ready) continue;
      switch_to(fibers[index]);
      ran = true;
      if (stopped) return true;
    }
    if (meet_at_simd_operation(simdgroup)) ran = true;
    progress = progress || ran;
  }
  return progress;
}

static bool all_done() {
  return std::all_of(fibers.begin(), fibers.begin() + group.threads,
                     [](const Fiber& fiber) { return fiber.state == State::done; });
}

static void run_group() {
  std::vector<int> simdgroups = in_order(group.simdgroups), lanes = in_order(simd_width);
  while (!all_done()) {
    if (launch->order == MTL_RANDOM) {
      std::shuffle(simdgroups.begin(), simdgroups.end(), shuffler);
      std::shuffle(lanes.begin(), lanes.end(), shuffler);
    }
    bool progress = false;
    for (int simdgroup : simdgroups) {
      if (run_simdgroup(simdgroup, lanes)) progress = true;
      if (stopped) return;
    }
    if (meet_at_threadgroup_barrier()) progress = true;
    if (!progress) {
      report_divergence();
      stopped = true;
      return;
    }
  }
}

void run_grid() {
  const uint32_t across = groups_along(0), down = groups_along(1), deep = groups_along(2);
  std::vector<int> order = in_order(across * down * deep);
  if (launch->order == MTL_RANDOM) std::shuffle(order.begin(), order.end(), shuffler);
  for (uint32_t index : order) {
    const uint32_t position[3] = {index % across, index / across % down, index / across / down};
    start_group(position);
    run_group();
    counters.threadgroup_bytes = std::max<uint64_t>(counters.threadgroup_bytes, group.threadgroup_bytes);
    if (stopped) return;
  }
}

}  // namespace emulator
