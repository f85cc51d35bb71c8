#include "rendezvous.h"

#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"
#include "races.h"
#include "reports.h"
#include "scheduler.h"

namespace emulator {

static const char* operation_name(int operation) {
  switch (operation) {
    case MTL_OP_REDUCE: return "SIMD reduction";
    case MTL_OP_SHUFFLE: return "SIMD shuffle";
    case MTL_OP_PREFIX: return "SIMD prefix operation";
    case MTL_OP_VOTE: return "SIMD vote";
    case MTL_OP_MATRIX_MULTIPLY: return "simdgroup_multiply(_accumulate)";
    case MTL_OP_MATRIX_MEMORY: return "simdgroup_load/store";
    case MTL_OP_SIMDGROUP_BARRIER: return "simdgroup_barrier";
    case MTL_OP_BROADCAST: return "simd_broadcast";
    case MTL_OP_THREADGROUP_BARRIER: return "threadgroup_barrier";
  }
  return "?";
}

static void report_early_exit(Fiber& waiting, int exited, const char* of) {
  current = &waiting;
  report(Kind::early_exit, at_line(waiting.line), nullptr, "%s while %d thread(s) of the %s have already returned",
         operation_name(waiting.operation), exited, of);
  current = nullptr;
}

// All live threads of [begin, end) wait in `state` at the same operation and line: the first of them, else null.
// The line tells call sites apart; a return address would not, since the compiler duplicates tails.
static Fiber* all_waiting(int begin, int end, State state, int& exited) {
  Fiber* first = nullptr;
  exited = 0;
  for (int i = begin; i < end; ++i) {
    Fiber& fiber = fibers[i];
    if (fiber.state == State::done) {
      ++exited;
      continue;
    }
    if (fiber.state != state) return nullptr;
    if (!first) first = &fiber;
    if (fiber.operation != first->operation || fiber.line != first->line) return nullptr;
  }
  return first;
}

static void pass_barrier(Fiber& fiber, bool whole_threadgroup) {
  Epoch* epochs[] = {&fiber.device_epoch, &fiber.threadgroup_epoch};
  const int flags[] = {MTL_MEM_DEVICE, MTL_MEM_THREADGROUP};
  for (int i = 0; i < 2; ++i) {
    if (!(fiber.mem_flags & flags[i])) continue;
    ++epochs[i]->simdgroup;
    if (whole_threadgroup) ++epochs[i]->threadgroup;
  }
}

bool meet_at_simd_operation(int simdgroup) {
  int begin = simdgroup * simd_width, end = std::min(begin + simd_width, group.threads), exited;
  Fiber* first = all_waiting(begin, end, State::at_simd_operation, exited);
  if (!first) return false;
  if (exited) report_early_exit(*first, exited, "SIMD-group");
  mtl_lane lanes[simd_width] = {};
  uint32_t active = 0;
  for (int i = begin; i < end; ++i) {
    if (fibers[i].state != State::at_simd_operation) continue;
    lanes[i - begin] = fibers[i].argument;
    active |= 1u << (i - begin);
  }
  ++counters.simd_operations;
  if (first->function) first->function(lanes, active, first->line);
  for (int i = begin; i < end; ++i) {
    Fiber& fiber = fibers[i];
    if (fiber.state != State::at_simd_operation) continue;
    fiber.state = State::ready;
    if (fiber.operation == MTL_OP_SIMDGROUP_BARRIER) pass_barrier(fiber, false);
  }
  return true;
}

bool meet_at_threadgroup_barrier() {
  int exited;
  Fiber* first = all_waiting(0, group.threads, State::at_threadgroup_barrier, exited);
  if (!first) return false;
  if (exited) report_early_exit(*first, exited, "threadgroup");
  ++counters.barriers;
  for (int i = 0; i < group.threads; ++i) {
    if (fibers[i].state != State::at_threadgroup_barrier) continue;
    fibers[i].state = State::ready;
    pass_barrier(fibers[i], true);
  }
  return true;
}

static std::string whereabouts(const Fiber& fiber) {
  if (fiber.state == State::done) return "returned";
  return std::string(operation_name(fiber.operation)) + " in line " + std::to_string(fiber.line);
}

void report_divergence() {
  std::vector<std::pair<std::string, std::vector<int>>> places;
  int line = 0;
  for (int i = 0; i < group.threads; ++i) {
    std::string place = whereabouts(fibers[i]);
    auto known = std::find_if(places.begin(), places.end(), [&](const auto& entry) { return entry.first == place; });
    if (known == places.end())
      places.push_back({place, {i}});
    else
      known->second.push_back(i);
    if (fibers[i].state != State::done && !line) line = fibers[i].line;
  }
  std::string message = "threads wait at different places: ";
  for (const auto& [place, threads] : places) {
    const Fiber& first = fibers[threads[0]];
    message += std::to_string(threads.size()) + " thread(s) from thread " + std::to_string(first.thread) +
               " (SIMD-group " + std::to_string(first.simdgroup) + ", lane " + std::to_string(first.lane) + ") at " +
               place + "; ";
  }
  report(Kind::divergence, at_line(line), nullptr, "%s", message.c_str());
}

static void wait(State state, int operation, int line, int mem_flags) {
  current->operation = operation;
  current->line = line;
  current->mem_flags = mem_flags;
  current->state = state;
  settle_collision();
  switch_to_scheduler();
}

}  // namespace emulator

using namespace emulator;

void mtl_simd_operation(int operation, int line, mtl_simd_function function, mtl_lane lane) {
  current->function = function;
  current->argument = lane;
  wait(State::at_simd_operation, operation, line, 0);
}

void mtl_simdgroup_barrier(int mem_flags, int line) {
  current->function = nullptr;
  wait(State::at_simd_operation, MTL_OP_SIMDGROUP_BARRIER, line, mem_flags);
}

void mtl_threadgroup_barrier(int mem_flags, int line) {
  wait(State::at_threadgroup_barrier, MTL_OP_THREADGROUP_BARRIER, line, mem_flags);
}

void mtl_bad_lane(int line, const char* what) { report(Kind::bad_lane, at_line(line), nullptr, "%s", what); }

void mtl_non_uniform(int line, const char* what) { report(Kind::non_uniform, at_line(line), nullptr, "%s", what); }

void mtl_bad_atomic_order(int line) {
  report(Kind::atomic_order, at_line(line), nullptr, "Metal's atomic functions know memory_order_relaxed only");
}

unsigned mtl_lane_index() { return current->lane; }

int mtl_current_reduce_order() { return launch->reduce_order; }
