#include "ffn_sm90_instance.cuh"

template void lowrank::launch_ffn_sm90<32, 8>(Ffn const&, int);
