// Which accesses of different threads are not ordered by a barrier, told from the shadow of each element.
#pragma once
#include <cstdint>

#include "fibers.h"
#include "memory.h"
#include "reports.h"

namespace emulator {

struct Access {
  uintptr_t address;
  unsigned size;
  bool reads, writes, atomic;
  Place place;
};

// Judges the access of `fiber` and marks it in the region's shadow.
void check_races(Region& region, const Access& access, const Fiber& fiber);

// A write that collides with another is harmless if it stores the same value: known only once it is done.
// Called before the next access and before every switch.
void settle_pending_collision();
void forget_collision();

extern bool collision_pending;

inline void settle_collision() {
  if (collision_pending) settle_pending_collision();
}

}  // namespace emulator
