// How many clusters a GPU holds at a time: its GPCs have different numbers of SMs, so only the driver knows.
#include "arguments.h"
#include "launch.h"

namespace {

// Stands for all Hopper kernels, each of which has an SM to itself.
__global__ void __launch_bounds__(lowrank::kThreads, 1) alone() {}

}  // namespace

int lowrank::clusters_that_fit(int cluster) {
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t const config = cluster_config(attribute, 1, cluster, kThreads, kSharedLimit, nullptr);
    check(cudaFuncSetAttribute(alone, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit), "shared memory");
    int result = 0;
    // A GPU that was divided may have no room for large clusters; then they are not used.
    if (cudaOccupancyMaxActiveClusters(&result, alone, &config) != cudaSuccess) cudaGetLastError();
    return result;
}
