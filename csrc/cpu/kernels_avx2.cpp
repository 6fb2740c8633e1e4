#include "simd_avx2.h"
#include "kernels_impl.h"

LOWRANK_LEVEL(level_avx2, "avx2", 127)
