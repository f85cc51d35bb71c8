// The Metal standard library as declarations, for `clang -fsyntax-only` on a kernel's text.
//
// Address spaces are real here (`address_space(1)` device, `(2)` constant, `(3)` threadgroup; `thread` is
// clang's default one), so a pointer that changes its space is an error, as in Metal. Nothing has a body:
// this header knows which calls are well-formed, never what they compute. After it comes MLX's own
// kernels/utils.h, as in every kernel that mx.fast.metal_kernel builds.
#pragma once

#include "language.h"
#include "traits.h"
#include "vectors.h"
#include "math.h"
#include "simdgroup.h"
#include "atomics.h"
#include "vector_constructors.h"

#include "mlx/backend/metal/kernels/utils.h"
