// All kernels of one level. A file that is compiled for an instruction set includes its simd_*.h, then this, and names the
// level. Everything is in an unnamed namespace and no library template is used: code of one level never stands in for another's.
#include <cmath>

#include "kernels.h"

using namespace lowrank::cpu;

#include "activations_impl.h"
#include "product_impl.h"
#include "rows_impl.h"
#include "attention_impl.h"

#define LOWRANK_LEVEL(function, name, largest_code)                                                               \
    namespace lowrank::cpu {                                                                                     \
    Kernels const& function() {                                                                                  \
        static constexpr Kernels kernels{name,  kLanes, kRows,  kVectors,          largest_code, product, normalise, \
                                         words, places, encode, attention_scratch, attend,       activate};          \
        return kernels;                                                                                          \
    }                                                                                                            \
    }
