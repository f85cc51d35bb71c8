// Undefined behaviour of C++, which is undefined in Metal too: the handlers that g++ calls under -fsanitize=...
// Each gets a static record that begins with the place in the source.
#include <cstdint>

#include "fibers.h"
#include "reports.h"
#include "scheduler.h"

namespace {

using namespace emulator;

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct TypeMismatch {
  SourceLocation location;
  void* type;
  unsigned char log2_alignment, access_kind;
};

void report_undefined(const char* what, void* location) {
  if (current)
    report(Kind::undefined_behaviour, at_line(static_cast<SourceLocation*>(location)->line), nullptr, "%s", what);
}

}  // namespace

#define HANDLER(name, what) \
  MTL_EXPORT void __ubsan_handle_##name(void* location, uintptr_t, uintptr_t) { report_undefined(what, location); }

extern "C" {
HANDLER(shift_out_of_bounds, "shift out of range")
HANDLER(add_overflow, "signed integer overflow in +")
HANDLER(sub_overflow, "signed integer overflow in -")
HANDLER(mul_overflow, "signed integer overflow in *")

MTL_EXPORT void __ubsan_handle_negate_overflow(void* location, uintptr_t) {
  report_undefined("signed integer overflow in unary -", location);
}

MTL_EXPORT void __ubsan_handle_float_cast_overflow(void* location, uintptr_t) {
  report_undefined("float value does not fit the integer type", location);
}

// The processor would trap.
MTL_EXPORT void __ubsan_handle_divrem_overflow(void* location, uintptr_t, uintptr_t) {
  report_undefined("integer division by zero or overflow", location);
  if (current) stop_kernel();
}

// The access that follows would leave a fixed-size array: a private one has no shadow that would tell.
MTL_EXPORT void __ubsan_handle_out_of_bounds(void* location, uintptr_t index) {
  if (!current) return;
  report(Kind::out_of_bounds, at_line(static_cast<SourceLocation*>(location)->line), nullptr,
         "index %lld of a fixed-size array", static_cast<long long>(index));
  stop_kernel();
}

MTL_EXPORT void __ubsan_handle_type_mismatch_v1(TypeMismatch* mismatch, uintptr_t address) {
  if (!current) return;
  unsigned alignment = 1u << mismatch->log2_alignment;
  if (address % alignment)
    report(Kind::misaligned, at_line(mismatch->location.line), nullptr, "address 0x%llx is not aligned to %u bytes",
           static_cast<unsigned long long>(address), alignment);
}
}
