// Vectors of 8 for AVX2, with AVX-VNNI where the compiler is told so. Included once by each file that is compiled for a
// level; see kernels_impl.h.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

using F = __m256;
using I = __m256i;
// How assembly names such a register.
#define REGISTER "x"
constexpr int kLanes = 8;
// Accumulators of a tile, in rows and vectors: with the operands, at most the 16 registers.
#ifdef __AVXVNNI__
constexpr int kRows = 6, kVectors = 2;
#else
constexpr int kRows = 4, kVectors = 2;
#endif

inline F load(float const* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
inline F set(float a) { return _mm256_set1_ps(a); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F least(F a, F b) { return _mm256_min_ps(a, b); }
inline F most(F a, F b) { return _mm256_max_ps(a, b); }
inline F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float sum(F a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float largest(F a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
// a * 2^n for whole n from -126 to 127.
inline F times_power(F a, F n) {
    I const exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline I lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline I first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes()); }
// The first n lanes from memory, zeros behind.
inline F load_first(float const* p, int n) { return _mm256_maskload_ps(p, first(n)); }
inline void store_first(float* p, F a, int n) { _mm256_maskstore_ps(p, first(n), a); }
// The first n lanes of a, those of b behind.
inline F take_first(F a, F b, int n) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(first(n))); }
// Columns of up to 8 rows that lie `stride` apart, as vectors that lie `out_stride` apart; zeros for the rows that lack.
inline void transpose(float const* p, ptrdiff_t stride, int rows, int columns, float* out, ptrdiff_t out_stride) {
    if (rows > kLanes) rows = kLanes;
    if (columns > kLanes) columns = kLanes;
    F a[8], b[8];
    for (int r = 0; r < 8; ++r) a[r] = r < rows ? load_first(p + r * stride, columns) : _mm256_setzero_ps();
    // Pairs, then fours of rows within the halves of a vector, then the halves.
    for (int r = 0; r < 8; r += 2) {
        b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
        b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {
        a[r] = _mm256_shuffle_ps(b[r], b[r + 2], 0x44);
        a[r + 1] = _mm256_shuffle_ps(b[r], b[r + 2], 0xee);
        a[r + 2] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0x44);
        a[r + 3] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0xee);
    }
    for (int c = 0; c < 4; ++c) {
        b[c] = _mm256_permute2f128_ps(a[c], a[c + 4], 0x20);
        b[c + 4] = _mm256_permute2f128_ps(a[c], a[c + 4], 0x31);
    }
    for (int c = 0; c < columns; ++c) store(out + c * out_stride, b[c]);
}

inline I load(int32_t const* p) { return _mm256_loadu_si256(reinterpret_cast<I const*>(p)); }
inline I load_codes(void const* p) { return _mm256_loadu_si256(static_cast<I const*>(p)); }
inline I repeat_codes(void const* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}
// Sums of four neighbouring products of unsigned and signed bytes, added to acc.
inline I dot(I acc, I codes, I weights) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(acc, codes, weights);
#else
    // Pairs are added in 16 bits: exact for codes of 7 bits, 2 * 127 * 127 < 2^15.
    I const pairs = _mm256_maddubs_epi16(codes, weights);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }
// a, whole numbers between 0 and 255, as bytes.
inline void store_bytes(uint8_t* p, F a) {
    I const whole = _mm256_cvtps_epi32(a);
    __m128i const words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

}  // namespace
