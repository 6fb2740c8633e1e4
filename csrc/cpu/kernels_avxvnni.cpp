#include "simd_avx2.h"
#include "kernels_impl.h"

LOWRANK_LEVEL(level_avxvnni, "avx_vnni", 255)
