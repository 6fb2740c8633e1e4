// The interface of the kernels: plain numbers and pointers in, an error code and a message out. No torch, no CUDA types.
#pragma once
#include <cstdint>

namespace lowrank {

enum Dtype : int { kBfloat16 = 0, kFloat16 = 1 };
enum Activation : int { kNone = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };
enum Code : int { kOk = 0, kBadArgument = 1, kCudaError = 2 };

// A matrix of 16-bit elements whose rows are contiguous; `stride` is between rows, in elements.
struct Matrix {
    void* data = nullptr;
    int64_t rows = 0, columns = 0, stride = 0;
};

// y = act((x down^T) up^T + bias); hidden (x down^T) is written if its pointer is set.
struct Linear {
    Matrix x, down, up, y, hidden;
    void const* bias = nullptr;
    int64_t rank = 0;  // of the factors before padding
    int dtype = kBfloat16, activation = kNone, device = 0;
    int rows = 0, cluster = 0, weights = 0;  // 0: chosen here. rows of a tile, CTAs of a cluster, whether it shares weights
    void* stream = nullptr;
};

// y = act(x down1^T up1^T + bias1) down2^T up2^T + bias2; p = x down1^T and q are written if their pointers are set.
struct Ffn {
    Matrix x, down1, up1, down2, up2, y, p, q;
    void const *bias1 = nullptr, *bias2 = nullptr;
    int64_t rank1 = 0, rank2 = 0;
    int dtype = kBfloat16, activation = kNone, device = 0;
    int cluster = 0;
    void* stream = nullptr;
};

struct Result {
    int code = kOk;
    char message[240] = "";
};

Result linear(Linear const&);
Result ffn(Ffn const&);

}  // namespace lowrank
