#include "races.h"

#include <cstdio>
#include <cstring>

#include "scheduler.h"

namespace emulator {

constexpr unsigned widest_collision = 16;

struct Collision {
  uintptr_t address;
  unsigned size;
  unsigned char before[widest_collision];
  Kind kind;
  Place place;
  std::string buffer, message;
};

static Collision pending;
bool collision_pending = false;

void forget_collision() { collision_pending = false; }

void settle_pending_collision() {
  collision_pending = false;
  bool same = memcmp(reinterpret_cast<void*>(pending.address), pending.before, pending.size) == 0;
  report(same ? Kind::redundant_write : pending.kind, pending.place, pending.buffer.c_str(), "%s (%s)",
         pending.message.c_str(), same ? "same value: benign" : "different values");
}

// One element, one access: the state that the rules below compare.
struct Meeting {
  const Region& region;
  const Access& access;
  const Fiber& fiber;
  Epoch epoch;
  size_t byte;

  bool same_group(uint32_t other) const { return other == group.number; }

  bool same_simdgroup(uint16_t thread) const { return thread / simd_width == fiber.simdgroup; }

  const char* name() const { return region.name.c_str(); }

  const char* verb() const { return access.writes ? "write" : "read"; }

  Kind kind(uint32_t other_group) const {
    if (!same_group(other_group)) return Kind::grid_race;
    return region.is_threadgroup ? Kind::threadgroup_race : Kind::device_race;
  }
};

static bool collides_with_write(const Meeting& meeting, const Shadow& shadow) {
  if (meeting.access.atomic && (shadow.write_flags & Shadow::atomic)) return false;
  if (!meeting.same_group(shadow.write_group)) return true;
  if (shadow.write_thread == meeting.fiber.thread) return false;
  if (shadow.write_epoch < meeting.epoch.threadgroup) return false;
  return !(meeting.same_simdgroup(shadow.write_thread) && shadow.write_simd_epoch < meeting.epoch.simdgroup);
}

static void remember_collision(const Meeting& meeting, const Shadow& shadow) {
  if (collision_pending) return;
  collision_pending = true;
  bool same_group = meeting.same_group(shadow.write_group);
  char message[256];
  snprintf(message, sizeof message, "write of '%s'[byte %zu] collides with a write by %s %u", meeting.name(),
           meeting.byte, same_group ? "thread" : "threadgroup",
           same_group ? shadow.write_thread : shadow.write_group - 1);
  pending.address = meeting.access.address;
  pending.size = meeting.access.size;
  memcpy(pending.before, reinterpret_cast<void*>(pending.address), pending.size);
  pending.kind = meeting.kind(shadow.write_group);
  pending.place = meeting.access.place;
  pending.buffer = meeting.region.name;
  pending.message = message;
}

static void report_write_race(const Meeting& meeting, const Shadow& shadow) {
  if (!meeting.same_group(shadow.write_group)) {
    report(Kind::grid_race, meeting.access.place, meeting.name(),
           "%s of '%s'[byte %zu] which another threadgroup (number %u) wrote in the same dispatch", meeting.verb(),
           meeting.name(), meeting.byte, shadow.write_group - 1);
    return;
  }
  const char* remedy = meeting.same_simdgroup(shadow.write_thread) ? "same SIMD-group; needs simdgroup_barrier"
                                                                   : "other SIMD-group; needs threadgroup_barrier";
  report(meeting.kind(shadow.write_group), meeting.access.place, meeting.name(),
         "%s of '%s'[byte %zu] races with a write by thread %u (%s) with no barrier in between", meeting.verb(),
         meeting.name(), meeting.byte, shadow.write_thread, remedy);
}

static void check_against_write(const Meeting& meeting, const Shadow& shadow) {
  if (!collides_with_write(meeting, shadow)) return;
  const Access& access = meeting.access;
  bool two_plain_writes = access.writes && !access.atomic && !(shadow.write_flags & Shadow::atomic);
  if (two_plain_writes && access.size <= widest_collision)
    remember_collision(meeting, shadow);
  else
    report_write_race(meeting, shadow);
}

static void check_against_reads(const Meeting& meeting, const Shadow& shadow) {
  if (meeting.access.atomic && (shadow.write_flags & Shadow::atomic)) return;
  bool same_group = meeting.same_group(shadow.read_group);
  Kind kind =
      same_group && !(shadow.read_flags & Shadow::other_threadgroups) ? meeting.kind(group.number) : Kind::grid_race;
  if (kind != Kind::grid_race) {
    if (shadow.read_epoch < meeting.epoch.threadgroup) return;
    bool one_simdgroup = !(shadow.read_flags & Shadow::other_simdgroups);
    bool own_read = !(shadow.read_flags & Shadow::other_threads) && shadow.read_thread == meeting.fiber.thread;
    if (one_simdgroup && own_read) return;
    if (one_simdgroup && meeting.same_simdgroup(shadow.read_thread)) {
      if (shadow.read_simd_epoch < meeting.epoch.simdgroup) return;
      kind = Kind::simdgroup_write_after_read;
    }
  }
  report(kind, meeting.access.place, meeting.name(),
         "write of '%s'[byte %zu] races with an earlier read by thread %u with no barrier in between", meeting.name(),
         meeting.byte, shadow.read_thread);
}

static void mark_write(const Meeting& meeting, Shadow& shadow) {
  shadow.write_group = group.number;
  shadow.write_epoch = meeting.epoch.threadgroup;
  shadow.write_simd_epoch = meeting.epoch.simdgroup;
  shadow.write_thread = meeting.fiber.thread;
  shadow.write_flags = Shadow::valid | (meeting.access.atomic ? Shadow::atomic : 0);
  shadow.read_flags = 0;
}

static void mark_read(const Meeting& meeting, Shadow& shadow, bool read_before) {
  bool known_group = meeting.same_group(shadow.read_group);
  if (read_before && !known_group) {
    shadow.read_flags |= Shadow::other_threadgroups;
    return;
  }
  if (!read_before || shadow.read_epoch < meeting.epoch.threadgroup) {
    shadow.read_group = group.number;
    shadow.read_epoch = meeting.epoch.threadgroup;
    shadow.read_simd_epoch = meeting.epoch.simdgroup;
    shadow.read_thread = meeting.fiber.thread;
    shadow.read_flags = Shadow::valid | (shadow.read_flags & Shadow::other_threadgroups);
    return;
  }
  if (!meeting.same_simdgroup(shadow.read_thread)) {
    shadow.read_flags |= Shadow::other_simdgroups;
    return;
  }
  if (shadow.read_thread != meeting.fiber.thread) shadow.read_flags |= Shadow::other_threads;
  if (shadow.read_simd_epoch < meeting.epoch.simdgroup) shadow.read_simd_epoch = meeting.epoch.simdgroup;
}

void check_races(Region& region, const Access& access, const Fiber& fiber) {
  const Epoch epoch = region.is_threadgroup ? fiber.threadgroup_epoch : fiber.device_epoch;
  size_t first = (access.address - region.begin) / region.granule;
  size_t last = (access.address + access.size - 1 - region.begin) / region.granule;
  for (size_t element = first; element <= last; ++element) {
    Shadow& shadow = region.shadow[element];
    Meeting meeting{region, access, fiber, epoch, element * region.granule};
    bool written = shadow.write_flags & Shadow::valid;
    bool read_before = shadow.read_flags & Shadow::valid;
    if (region.is_threadgroup) {
      written = written && meeting.same_group(shadow.write_group);
      read_before = read_before && meeting.same_group(shadow.read_group);
    }
    if (access.reads && !written && !region.initialised)
      report(region.is_threadgroup ? Kind::uninitialised_threadgroup : Kind::uninitialised_output, access.place,
             meeting.name(), "read of '%s'[byte %zu] which no thread has written", meeting.name(), meeting.byte);
    if (written) check_against_write(meeting, shadow);
    if (access.writes && read_before) check_against_reads(meeting, shadow);
    if (access.writes)
      mark_write(meeting, shadow);
    else
      mark_read(meeting, shadow, read_before);
  }
}

}  // namespace emulator
