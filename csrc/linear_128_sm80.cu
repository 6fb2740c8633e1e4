#include "linear_sm80_instance.cuh"

template void lowrank::launch_linear_sm80<128>(Linear const&, int);
