#include "simd_avx512.h"
#include "kernels_impl.h"

LOWRANK_LEVEL(level_avx512vnni, "avx512_vnni", 255)
