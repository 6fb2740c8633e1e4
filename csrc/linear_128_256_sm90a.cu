#include "linear_sm90_instance.cuh"

template void lowrank::launch_linear_sm90<128, 256>(Linear const&, int, int, int);
