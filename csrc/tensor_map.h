// Descriptions of matrices for TMA, made by the driver. The driver is looked up when it is first needed, so that the
// module loads on a machine without one.
#pragma once
#include <cuda.h>

#include "lowrank.h"

namespace lowrank {

// A map of boxes of `width` columns (32 or 64: one swizzle row) by `height` rows. Throws std::runtime_error.
CUtensorMap tensor_map(Matrix const& matrix, int dtype, int width, int height);

}  // namespace lowrank
