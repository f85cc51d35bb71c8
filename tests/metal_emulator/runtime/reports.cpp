#include "reports.h"

#include <cstdarg>
#include <cstdio>
#include <vector>

#include "fibers.h"
#include "scheduler.h"

namespace emulator {

// One broken kernel can break in every thread: more would only repeat.
constexpr size_t most_findings = 64;

static std::vector<mtl_finding> findings;
static std::vector<Kind> kinds;

// Known to findings.py by the same words.
static const char* kind_name(Kind kind) {
  switch (kind) {
    case Kind::out_of_bounds: return "out-of-bounds";
    case Kind::padding_read: return "padding read";
    case Kind::write_to_input: return "write to read-only input";
    case Kind::uninitialised_threadgroup: return "uninitialised threadgroup memory";
    case Kind::uninitialised_output: return "uninitialised output read";
    case Kind::threadgroup_race: return "data race (threadgroup memory)";
    case Kind::device_race: return "data race (device memory)";
    case Kind::grid_race: return "data race between threadgroups";
    case Kind::divergence: return "divergence";
    case Kind::early_exit: return "early exit";
    case Kind::bad_lane: return "bad lane";
    case Kind::non_uniform: return "non-uniform argument";
    case Kind::atomic_order: return "atomic order";
    case Kind::threadgroup_limit: return "threadgroup memory limit";
    case Kind::private_memory: return "private memory leak";
    case Kind::not_written: return "output not written";
    case Kind::undefined_behaviour: return "undefined behaviour";
    case Kind::misaligned: return "misaligned access";
    case Kind::time_limit: return "time limit";
    case Kind::crash: return "crash";
    case Kind::redundant_write: return "redundant write";
    case Kind::simdgroup_write_after_read: return "write-after-read inside a SIMD-group";
  }
  return "?";
}

void clear_findings() {
  findings.clear();
  kinds.clear();
}

int finding_count() { return static_cast<int>(findings.size()); }

static bool known(Kind kind, Place place) {
  for (size_t i = 0; i < findings.size(); ++i)
    if (kinds[i] == kind && findings[i].program_counter == place.program_counter && findings[i].line == place.line)
      return true;
  return false;
}

void report(Kind kind, Place place, const char* buffer, const char* format, ...) {
  if (findings.size() >= most_findings || known(kind, place)) return;
  mtl_finding finding{};
  snprintf(finding.kind, sizeof finding.kind, "%s", kind_name(kind));
  snprintf(finding.buffer, sizeof finding.buffer, "%s", buffer ? buffer : "");
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(finding.message, sizeof finding.message, format, arguments);
  va_end(arguments);
  finding.program_counter = place.program_counter;
  finding.line = place.line;
  finding.has_thread = current != nullptr;
  for (int axis = 0; axis < 3; ++axis) {
    finding.threadgroup[axis] = group.position[axis];
    if (current) finding.thread[axis] = current->ids.thread_position_in_threadgroup[axis];
  }
  findings.push_back(finding);
  kinds.push_back(kind);
}

}  // namespace emulator

extern "C" int mtl_get_finding(int index, mtl_finding* finding) {
  if (index < 0 || index >= emulator::finding_count()) return -1;
  *finding = emulator::findings[index];
  return 0;
}
