// What launch.cpp and the kernels' files agree on: each .cu file launches one tile, in both dtypes.
#pragma once
#include <cuda_runtime_api.h>

#include "lowrank.h"
#include "schedule.h"

namespace lowrank {

// Launches a Hopper linear of the tile <Rows, Rank>: the rank held is Rank * columns. Throws std::runtime_error.
template <int Rows, int Rank>
void launch_linear_sm90(Linear const& call, int cluster, int columns, int max_clusters);
// Launches a Hopper feed-forward whose CTAs make Rank columns of the intermediates, `Columns` of them in a cluster.
template <int Rank, int Columns>
void launch_ffn_sm90(Ffn const& call, int max_clusters);
// Launches an Ampere linear for ranks up to Rank.
template <int Rank>
void launch_linear_sm80(Linear const& call, int splits);

// Throws std::runtime_error with the name of what failed.
void check(cudaError_t code, char const* what);
// How many clusters of that size the current GPU holds at a time; 0 if it takes none.
int clusters_that_fit(int cluster);
// What a launch in clusters takes; `attribute` has to outlive it.
cudaLaunchConfig_t cluster_config(cudaLaunchAttribute& attribute, int clusters, int cluster, int threads, int shared_bytes,
                                  void* stream);
// Launches `kernel` in clusters, with its shared memory allowed.
void launch_cluster(void const* kernel, void* arguments, int clusters, int cluster, int threads, int shared_bytes,
                    void* stream);

}  // namespace lowrank
