#include "ffn_sm90_instance.cuh"

template void lowrank::launch_ffn_sm90<64, 2>(Ffn const&, int);
