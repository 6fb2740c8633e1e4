// Every activation on pairs of elements, for the test that executes it on all of them.
#include "activation.cuh"

namespace lowrank {

struct Block {
    uint32_t const* x;
    uint32_t* y;
    int pairs, kind;
};

template <class E>
__global__ void activations(Block const p) {
    for (int i = threadIdx.x; i < p.pairs; i += 128) {
        float2 const z = unpack_pair<E>(load_pair(reinterpret_cast<E const*>(p.x + i), true));
        auto pair = cute::make_tensor<float>(cute::Int<2>{});
        pair(0) = z.x, pair(1) = z.y;
        activate_all(p.kind, pair);
        p.y[i] = round_pair<E>(pair(0), pair(1));
    }
}

template __global__ void activations<cutlass::bfloat16_t>(Block);
template __global__ void activations<cutlass::half_t>(Block);

}  // namespace lowrank
