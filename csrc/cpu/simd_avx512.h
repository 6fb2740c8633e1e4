// Vectors of 16 for AVX-512 with VNNI. Included once by each file that is compiled for a level; see kernels_impl.h.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

using F = __m512;
using I = __m512i;
// How assembly names such a register.
#define REGISTER "v"
constexpr int kLanes = 16;
// Accumulators of a tile, in rows and vectors: with the operands, at most the 32 registers.
constexpr int kRows = 6, kVectors = 4;

inline F load(float const* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
inline F set(float a) { return _mm512_set1_ps(a); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F least(F a, F b) { return _mm512_min_ps(a, b); }
inline F most(F a, F b) { return _mm512_max_ps(a, b); }
inline F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float sum(F a) { return _mm512_reduce_add_ps(a); }
inline float largest(F a) { return _mm512_reduce_max_ps(a); }
// a * 2^n for whole n.
inline F times_power(F a, F n) { return _mm512_scalef_ps(a, n); }
inline __mmask16 first(int n) { return n >= kLanes ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }
// The first n lanes from memory, zeros behind.
inline F load_first(float const* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store_first(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
// The first n lanes of a, those of b behind.
inline F take_first(F a, F b, int n) { return _mm512_mask_blend_ps(first(n), b, a); }
// Columns of up to 16 rows that lie `stride` apart, as vectors that lie `out_stride` apart; zeros for the rows that lack.
inline void transpose(float const* p, ptrdiff_t stride, int rows, int columns, float* out, ptrdiff_t out_stride) {
    if (rows > kLanes) rows = kLanes;
    if (columns > kLanes) columns = kLanes;
    F a[16], b[16];
    for (int r = 0; r < 16; ++r) a[r] = r < rows ? load_first(p + r * stride, columns) : _mm512_setzero_ps();
    // Pairs, then fours of rows within the quarters of a vector, then the quarters.
    for (int r = 0; r < 16; r += 2) {
        b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
    }
    for (int r = 0; r < 16; r += 4) {
        a[r] = _mm512_shuffle_ps(b[r], b[r + 2], 0x44);
        a[r + 1] = _mm512_shuffle_ps(b[r], b[r + 2], 0xee);
        a[r + 2] = _mm512_shuffle_ps(b[r + 1], b[r + 3], 0x44);
        a[r + 3] = _mm512_shuffle_ps(b[r + 1], b[r + 3], 0xee);
    }
    for (int c = 0; c < 4; ++c) {
        F const low = _mm512_shuffle_f32x4(a[c], a[c + 4], 0x88), high = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0x88);
        F const low2 = _mm512_shuffle_f32x4(a[c], a[c + 4], 0xdd), high2 = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0xdd);
        b[c] = _mm512_shuffle_f32x4(low, high, 0x88);
        b[c + 4] = _mm512_shuffle_f32x4(low2, high2, 0x88);
        b[c + 8] = _mm512_shuffle_f32x4(low, high, 0xdd);
        b[c + 12] = _mm512_shuffle_f32x4(low2, high2, 0xdd);
    }
    for (int c = 0; c < columns; ++c) store(out + c * out_stride, b[c]);
}

inline I load(int32_t const* p) { return _mm512_loadu_si512(p); }
inline I load_codes(void const* p) { return _mm512_loadu_si512(p); }
inline I repeat_codes(void const* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
// Sums of four neighbouring products of unsigned and signed bytes, added to acc.
inline I dot(I acc, I codes, I weights) { return _mm512_dpbusd_epi32(acc, codes, weights); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
// a, whole numbers between 0 and 255, as bytes.
inline void store_bytes(uint8_t* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}

}  // namespace
