// From a call to a launch: checks, the choice of tile and cluster, and the tables of what was compiled.
#include "launch.h"

#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "choice.h"

namespace lowrank {

void check(cudaError_t code, char const* what) {
    if (code != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

cudaLaunchConfig_t cluster_config(cudaLaunchAttribute& attribute, int clusters, int cluster, int threads, int shared_bytes,
                                  void* stream) {
    attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(clusters * cluster);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    return config;
}

void launch_cluster(void const* kernel, void* arguments, int clusters, int cluster, int threads, int shared_bytes,
                    void* stream) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "shared memory");
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t const config = cluster_config(attribute, clusters, cluster, threads, shared_bytes, stream);
    void* pointers[] = {arguments};
    check(cudaLaunchKernelExC(&config, kernel, pointers), "launch");
}

namespace {

// What a GPU is asked once.
struct Facts {
    int processors = 0, major = 0;
    Gpu gpu;

    explicit Facts(int index) {
        check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index), "processors");
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "compute capability");
#ifdef LOWRANK_SM90a
        if (major == 9)
            for (int cluster : {1, 2, 4, 8}) gpu.fit[cluster] = clusters_that_fit(cluster);
#endif
    }
};

// The facts of the current GPU, which has that number.
Facts const& facts_of(int index) {
    static std::mutex mutex;
    static std::map<int, Facts> known;
    std::lock_guard<std::mutex> const lock(mutex);
    return known.try_emplace(index, index).first->second;
}

// The GPU of a call, current until the call returns.
struct Device {
    int before = 0;

    explicit Device(int index) {
        check(cudaGetDevice(&before), "device");
        check(cudaSetDevice(index), "device");
    }
    ~Device() { cudaSetDevice(before); }
    Device(Device const&) = delete;
};

[[noreturn]] void refuse(std::string const& text) { throw std::invalid_argument(text); }

void check_matrix(char const* name, Matrix const& m, int64_t rows, int64_t columns) {
    if (m.rows != rows || m.columns != columns)
        refuse(std::string(name) + " has shape (" + std::to_string(m.rows) + ", " + std::to_string(m.columns) +
               "); it needs (" + std::to_string(rows) + ", " + std::to_string(columns) + ")");
    if (m.data == nullptr || reinterpret_cast<uintptr_t>(m.data) % 16 != 0 || m.stride % 8 != 0 || m.stride < columns ||
        columns % 8 != 0 || columns == 0)
        refuse(std::string(name) + " needs rows that start on 16 bytes and a multiple of 8 columns");
    if (rows <= 0 || rows > INT32_MAX / 2 || columns > INT32_MAX / 2)
        refuse(std::string(name) + " needs between 1 and 2**30 rows and columns");
}

void check_bias(char const* name, void const* bias) {
    if (reinterpret_cast<uintptr_t>(bias) % 4 != 0) refuse(std::string(name) + " needs to start on 4 bytes");
}

void check_kind(int dtype, int activation) {
    if (dtype != kBfloat16 && dtype != kFloat16) refuse("dtype is " + std::to_string(dtype) + "; it needs 0 or 1");
    if (activation < kNone || activation > kRelu) refuse("activation is " + std::to_string(activation) + "; it needs 0 to 3");
}

template <class Call, class Run>
Result guarded(Call const& call, Run run) {
    Result result;
    try {
        run(call);
    } catch (std::invalid_argument const& error) {
        result.code = kBadArgument;
        std::snprintf(result.message, sizeof result.message, "%s", error.what());
    } catch (std::exception const& error) {
        result.code = kCudaError;
        std::snprintf(result.message, sizeof result.message, "%s", error.what());
    }
    return result;
}

[[maybe_unused]] void hopper_linear(Linear const& call, Choice c, Gpu const& gpu) {
#ifdef LOWRANK_SM90a
#define TILE(r, k) \
    if (c.rows == r && c.rank == k) return launch_linear_sm90<r, k>(call, c.cluster, c.columns(), gpu.fit[c.cluster]);
    LOWRANK_LINEAR_TILES(TILE)
#undef TILE
#endif
    refuse("there is no kernel for rank " + std::to_string(call.rank));
}

void run_linear(Linear const& call) {
    check_matrix("x", call.x, call.x.rows, call.x.columns);
    check_matrix("down", call.down, call.down.rows, call.x.columns);
    check_matrix("up", call.up, call.up.rows, call.down.rows);
    check_matrix("y", call.y, call.x.rows, call.up.rows);
    if (call.hidden.data != nullptr) check_matrix("hidden", call.hidden, call.x.rows, call.down.rows);
    if (call.rank < 1 || call.rank > call.down.rows) refuse("rank is outside the padded factors");
    check_bias("bias", call.bias);
    check_kind(call.dtype, call.activation);
    Device const device(call.device);
    Facts const& facts = facts_of(call.device);
    if (facts.major == 9) {
        Problem const p{int(call.x.rows), int(call.x.columns), int(call.up.rows), int(call.down.rows)};
        Choice const c = choose_linear(p, facts.gpu, call.rows, call.cluster, call.weights);
        if (c.rows == 0) refuse("no tile holds this rank with that number of rows and that cluster");
        return hopper_linear(call, c, facts.gpu);
    }
#ifdef LOWRANK_SM80
    if (facts.major == 8) {
        int const splits = ampere_splits(int(call.x.rows), int(call.up.rows), facts.processors);
        if (call.down.rows <= 128) return launch_linear_sm80<128>(call, splits);
        if (call.down.rows <= 256) return launch_linear_sm80<256>(call, splits);
        refuse("rank " + std::to_string(call.down.rows) + " is above 256");
    }
#endif
    refuse("no kernel was compiled for this GPU");
}

void run_ffn(Ffn const& call) {
    check_matrix("x", call.x, call.x.rows, call.x.columns);
    check_matrix("down1", call.down1, call.down1.rows, call.x.columns);
    check_matrix("up1", call.up1, call.up1.rows, call.down1.rows);
    check_matrix("down2", call.down2, call.down2.rows, call.up1.rows);
    check_matrix("up2", call.up2, call.up2.rows, call.down2.rows);
    check_matrix("y", call.y, call.x.rows, call.up2.rows);
    if (call.p.data != nullptr) check_matrix("p", call.p, call.x.rows, call.down1.rows);
    if (call.q.data != nullptr) check_matrix("q", call.q, call.x.rows, call.down2.rows);
    if (call.rank1 < 1 || call.rank1 > call.down1.rows || call.rank2 < 1 || call.rank2 > call.down2.rows)
        refuse("rank is outside the padded factors");
    check_bias("bias1", call.bias1);
    check_bias("bias2", call.bias2);
    check_kind(call.dtype, call.activation);
    Device const device(call.device);
    Facts const& facts = facts_of(call.device);
    if (facts.major != 9) refuse("the feed-forward kernel is for Hopper");
#ifdef LOWRANK_SM90a
    int const held = int(call.down1.rows > call.down2.rows ? call.down1.rows : call.down2.rows);
    Problem const p{int(call.x.rows), int(call.x.columns), int(call.y.columns), held, int(call.up1.rows)};
    Choice const c = choose_ffn(p, facts.gpu, call.cluster);
#define TILE(k, columns) \
    if (c.rank == k && c.cluster == columns) return launch_ffn_sm90<k, columns>(call, facts.gpu.fit[columns]);
    LOWRANK_FFN_TILES(TILE)
#undef TILE
#endif
    refuse("there is no kernel for these ranks");
}

}  // namespace

Result linear(Linear const& call) { return guarded(call, run_linear); }
Result ffn(Ffn const& call) { return guarded(call, run_ffn); }

}  // namespace lowrank
