#include "tensor_map.h"

#include <cuda_runtime_api.h>
#include <cudaTypedefs.h>

#include <stdexcept>
#include <string>

namespace lowrank {

static PFN_cuTensorMapEncodeTiled_v12000 encoder() {
    static PFN_cuTensorMapEncodeTiled_v12000 const found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult state{};
#if CUDART_VERSION >= 12050
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &state);
#else
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &state);
#endif
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(
            state == cudaDriverEntryPointSuccess ? function : nullptr);
    }();
    if (found == nullptr) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled; it needs to be 12.0 or newer");
    return found;
}

CUtensorMap tensor_map(Matrix const& matrix, int dtype, int width, int height) {
    CUtensorMap map;
    cuuint64_t const sizes[] = {cuuint64_t(matrix.columns), cuuint64_t(matrix.rows)};
    cuuint64_t const strides[] = {cuuint64_t(matrix.stride) * 2};
    cuuint32_t const box[] = {cuuint32_t(width), cuuint32_t(height)}, steps[] = {1, 1};
    CUresult const code = encoder()(
        &map, dtype == kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, matrix.data, sizes,
        strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        width == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (code != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled returned " + std::to_string(int(code)));
    return map;
}

}  // namespace lowrank
