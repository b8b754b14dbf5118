/* Arithmetic on vectors of 16 numbers. Every function is elementwise or has a fixed order of summation, so that results do
   not depend on how many rows are computed together. */
#pragma once

#include <immintrin.h>
#include <stdint.h>

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || !defined(__AVX512VL__)
#error "the processor has no AVX-512 with the extensions BW, DQ and VL"
#endif

#define INLINE static inline __attribute__((always_inline))

/* sum[i] + w[2i] x[2i] + w[2i+1] x[2i+1], bf16 pairs, summed in fp32. */
INLINE __m512 dot_bf16(__m512 sum, __m512i w, __m512i x) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
#else
    const __m512i high = _mm512_set1_epi32(0xffff0000);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), sum);
    return _mm512_fmadd_ps(
        _mm512_castsi512_ps(_mm512_and_si512(w, high)), _mm512_castsi512_ps(_mm512_and_si512(x, high)), sum);
#endif
}

/* The same for pairs of int16, exact as long as the sum fits into int32. */
INLINE __m512i dot_int16(__m512i sum, __m512i w, __m512i x) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(sum, w, x);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(w, x));
#endif
}

/* The same for groups of four: w int8, x uint8. */
INLINE __m512i dot_int8(__m512i sum, __m512i w, __m512i x) {
#ifdef __AVX512VNNI__
    return _mm512_dpbusd_epi32(sum, x, w);
#else
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), low = _mm512_set1_epi16(0xff);
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even, _mm512_and_si512(x, low)));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_srai_epi16(w, 8), _mm512_srli_epi16(x, 8)));
#endif
}

/* Rounds to bf16, ties to even; NaN stays NaN. */
INLINE __m256i to_bf16(__m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

INLINE __m512 from_bf16(const uint16_t *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

/* e^x to about 2 units in the last place, x between -87 and 88 (clamped). */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* x / (1 + e^-x) */
INLINE __m512 silu(__m512 x) {
    __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(x, _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
}

/* x / rms(x) * weight over `count` numbers, a multiple of 16. */
INLINE void rms_norm(const float *x, const float *weight, int64_t count, float epsilon, float *y) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(squares) / (float)count + epsilon);
    __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(mean));
    for (int64_t i = 0; i < count; i += 16)
        _mm512_storeu_ps(
            y + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), factor), _mm512_loadu_ps(weight + i)));
}

INLINE void widen(const uint16_t *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i += 16) _mm512_storeu_ps(to + i, from_bf16(from + i));
}

INLINE void narrow(const float *from, int64_t count, uint16_t *to) {
    for (int64_t i = 0; i < count; i += 16) _mm256_storeu_si256((__m256i *)(to + i), to_bf16(_mm512_loadu_ps(from + i)));
}

INLINE int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* The next `bytes` of a piece of memory, which begins at a multiple of 64. */
INLINE char *take(char **from, int64_t bytes) {
    char *start = *from;
    *from += padded(bytes);
    return start;
}
