// What the compiled kernel, the emulated <metal_stdlib>, the runtime and launch.py agree on.
// No standard header is included: in the kernel's translation unit ::exp would make metal::exp ambiguous.
#pragma once

#define MTL_EXPORT __attribute__((visibility("default")))

// The attributes of one thread, by the names that a kernel's signature gives them.
typedef struct mtl_ids {
  unsigned thread_position_in_grid[3];
  unsigned thread_position_in_threadgroup[3];
  unsigned threadgroup_position_in_grid[3];
  unsigned threads_per_grid[3];
  unsigned threads_per_threadgroup[3];
  unsigned dispatch_threads_per_threadgroup[3];
  unsigned threadgroups_per_grid[3];
  unsigned grid_origin[3];
  unsigned thread_index_in_threadgroup;
  unsigned thread_index_in_simdgroup;
  unsigned simdgroup_index_in_threadgroup;
  unsigned simdgroups_per_threadgroup;
  unsigned thread_index_in_quadgroup;
  unsigned quadgroup_index_in_threadgroup;
  unsigned quadgroups_per_threadgroup;
  unsigned dispatch_simdgroups_per_threadgroup;
  unsigned dispatch_quadgroups_per_threadgroup;
} mtl_ids;

// Calls the kernel for one thread; `args` holds one pointer per buffer of the signature.
typedef void (*mtl_entry_point)(void** args, const mtl_ids* ids);

enum mtl_role { MTL_INPUT = 0, MTL_OUTPUT = 1, MTL_INITIALISED_OUTPUT = 2 };

enum mtl_order { MTL_FORWARD = 0, MTL_REVERSE = 1, MTL_RANDOM = 2 };

enum mtl_reduce_order { MTL_ASCENDING = 0, MTL_DESCENDING = 1, MTL_SEQUENTIAL = 2 };

// Mirrored field by field in launch.py.
struct mtl_buffer {
  const char* name;
  void* data;
  unsigned long long bytes;
  unsigned long long offset;  // of the pointer that the kernel gets
  const unsigned char* gaps;  // one flag per byte: nonzero where no element lies; null without gaps
  int role;
  int granule;  // bytes of one element: the unit in which races are told apart
  unsigned long long bytes_read, bytes_written, distinct_bytes_read, distinct_bytes_written;
};

// Mirrored field by field in launch.py.
struct mtl_launch {
  mtl_entry_point entry;
  mtl_buffer* buffers;
  int buffer_count;
  unsigned grid[3], threadgroup[3];
  int order, seed, checked, reduce_order;
  double timeout_s;
  unsigned long long accesses, simd_operations, barriers, threadgroup_bytes;
  unsigned long long threadgroup_bytes_read, threadgroup_bytes_written, image_base;
  int overflowed;
};

// Mirrored field by field in launch.py.
struct mtl_finding {
  char kind[64], message[640], buffer[64];
  unsigned threadgroup[3], thread[3];
  int has_thread, line;
  unsigned long long program_counter;  // 0 where the line is known already
};

// One lane's side of a SIMD-group operation, and the function that computes it for all lanes at once.
struct mtl_lane {
  void* in;
  void* out;
  int parameter, variant;
};

typedef void (*mtl_simd_function)(mtl_lane* lanes, unsigned active_lanes, int line);

enum mtl_operation {
  MTL_OP_REDUCE = 1,
  MTL_OP_SHUFFLE,
  MTL_OP_PREFIX,
  MTL_OP_VOTE,
  MTL_OP_MATRIX_MULTIPLY,
  MTL_OP_MATRIX_MEMORY,
  MTL_OP_SIMDGROUP_BARRIER,
  MTL_OP_BROADCAST,
  MTL_OP_THREADGROUP_BARRIER
};

enum mtl_mem_flags { MTL_MEM_DEVICE = 1, MTL_MEM_THREADGROUP = 2 };

enum mtl_atomic_access_kind { MTL_ATOMIC_LOAD = 1, MTL_ATOMIC_STORE = 2, MTL_ATOMIC_UPDATE = 3 };

extern "C" {
// Called by the emulated standard library, in a kernel's thread.
MTL_EXPORT void* mtl_threadgroup_memory(int id, unsigned long bytes, int granule, const char* name, int line);
MTL_EXPORT void mtl_simd_operation(int operation, int line, mtl_simd_function function, mtl_lane lane);
MTL_EXPORT void mtl_simdgroup_barrier(int mem_flags, int line);
MTL_EXPORT void mtl_threadgroup_barrier(int mem_flags, int line);
MTL_EXPORT void mtl_atomic_access(const volatile void* address, int size, int kind);
MTL_EXPORT void mtl_bad_lane(int line, const char* what);
MTL_EXPORT void mtl_non_uniform(int line, const char* what);
MTL_EXPORT void mtl_bad_atomic_order(int line);
MTL_EXPORT unsigned mtl_lane_index();
MTL_EXPORT int mtl_current_reduce_order();

// Called by launch.py. mtl_run returns how many findings there are, or -1 when memory could not be mapped.
MTL_EXPORT int mtl_run(mtl_launch* launch);
MTL_EXPORT int mtl_get_finding(int index, mtl_finding* finding);
}
