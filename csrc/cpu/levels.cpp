// Which levels this processor has, by CPUID.
#include <cpuid.h>

#include "kernels.h"

namespace lowrank::cpu {

#ifdef LOWRANK_AVX2
Kernels const& level_avx2();
#endif
#ifdef LOWRANK_AVXVNNI
Kernels const& level_avxvnni();
#endif
#ifdef LOWRANK_AVX512VNNI
Kernels const& level_avx512vnni();
#endif

namespace {

// The compiler's own test asks the system, too, whether it keeps the registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avxvnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
bool has_avx512vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && has_avx2();
}

}  // namespace

std::vector<Kernels const*> const& levels() {
    static std::vector<Kernels const*> const found = [] {
        std::vector<Kernels const*> result;
#ifdef LOWRANK_AVX512VNNI
        if (has_avx512vnni()) result.push_back(&level_avx512vnni());
#endif
#ifdef LOWRANK_AVXVNNI
        if (has_avxvnni()) result.push_back(&level_avxvnni());
#endif
#ifdef LOWRANK_AVX2
        if (has_avx2()) result.push_back(&level_avx2());
#endif
        return result;
    }();
    return found;
}

}  // namespace lowrank::cpu
