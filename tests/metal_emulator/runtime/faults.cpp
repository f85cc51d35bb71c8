#include "faults.h"

#include <cmath>
#include <csignal>
#include <cstring>
#include <ctime>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "fibers.h"
#include "memory.h"
#include "reports.h"
#include "scheduler.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

namespace emulator {

sigjmp_buf FaultGuard::escape;

// Not SIGALRM, which a test runner may use for its own limit.
static const int time_limit_signal = SIGRTMIN + 7;
static const int guarded_signals[] = {SIGSEGV, SIGBUS, SIGFPE, time_limit_signal};
constexpr int guarded_count = sizeof guarded_signals / sizeof *guarded_signals;

static struct sigaction former_actions[guarded_count];
static stack_t former_stack;
static timer_t timer;
static char signal_stack[64 * 1024];

static Place place_of(const ucontext_t* context) {
#if defined(__x86_64__)
  uint64_t counter = context->uc_mcontext.gregs[REG_RIP];
#else
  uint64_t counter = context->uc_mcontext.pc;
#endif
  // Findings carry return addresses, which lie behind the instruction.
  return in_kernel_image(counter) ? Place{counter + 1, 0} : Place{};
}

static void on_fault(int signal, siginfo_t* information, void* context) {
  uintptr_t address = reinterpret_cast<uintptr_t>(information->si_addr);
  Place place = place_of(static_cast<ucontext_t*>(context));
  const Region* region = signal == SIGSEGV ? region_at(address) : nullptr;
  if (signal == time_limit_signal)
    report(Kind::time_limit, place, nullptr, "the kernel did not finish in %g s (an infinite loop?)",
           launch->timeout_s);
  else if (region && region->begin)
    report(Kind::out_of_bounds, place, region->name.c_str(), "guard page hit at byte offset %lld of '%s' (%zu bytes)",
           static_cast<long long>(address - region->begin), region->name.c_str(), region->bytes());
  else
    report(Kind::crash, place, nullptr, "signal %d (%s) at address 0x%llx%s", signal, strsignal(signal),
           static_cast<unsigned long long>(address),
           on_a_stack_guard(address) ? ": the thread's stack overflowed" : "");
  stopped = true;
  current = nullptr;
  siglongjmp(FaultGuard::escape, 1);
}

FaultGuard::FaultGuard(double timeout_s) {
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &former_stack);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  for (int i = 0; i < guarded_count; ++i) sigaction(guarded_signals[i], &action, &former_actions[i]);
  // To this very thread: the jump must land on the stack that runs the kernel.
  struct sigevent event{};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = time_limit_signal;
  event.sigev_notify_thread_id = static_cast<pid_t>(syscall(SYS_gettid));
  timer_create(CLOCK_MONOTONIC, &event, &timer);
  struct itimerspec limit{};
  limit.it_value.tv_sec = static_cast<time_t>(std::floor(timeout_s));
  limit.it_value.tv_nsec = static_cast<long>((timeout_s - std::floor(timeout_s)) * 1e9);
  timer_settime(timer, 0, &limit, nullptr);
}

FaultGuard::~FaultGuard() {
  timer_delete(timer);
  for (int i = 0; i < guarded_count; ++i) sigaction(guarded_signals[i], &former_actions[i], nullptr);
  sigaltstack(&former_stack, nullptr);
}

}  // namespace emulator
