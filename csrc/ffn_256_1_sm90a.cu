#include "ffn_sm90_instance.cuh"

template void lowrank::launch_ffn_sm90<256, 1>(Ffn const&, int);
