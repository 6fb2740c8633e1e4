#include "ffn_sm90_instance.cuh"

template void lowrank::launch_ffn_sm90<64, 4>(Ffn const&, int);
