/* Matrix products y = x W^T of a few rows x, bound by reading W once.

   W is packed in panels of 32 outputs: [panel][k / 2][32][k % 2], bf16 or int8. A panel is read in order, one input pair at a
   time, by a tile of up to 12 rows whose sums stay in registers. Each output is one sum over k in ascending order, whatever
   the number of rows: a pass over many tokens gives the numbers of passes over single ones, bit for bit.

   int8 weights have one scale per output. The rows x are then rounded to integers of up to 16 bits with one scale per row,
   and their products are summed exactly. Where 8 bits are enough, an instruction takes twice as many: panels are then
   [panel][k / 4][32][k % 4], and 128 is added to the integers, which has to be taken from the sums. */
#pragma once

#include "vectors.h"

/* More rows of int16 pairs would not stay in registers. AHEAD: bytes that are prefetched; FAR_AHEAD: into the second-level
   cache, by tiles of MANY_ROWS or more bf16 rows. Their arithmetic takes as long as reading the weights, and with 12 and 16 rows
   the two overlap better so: 3.6 to 3.1 ms and 5.5 to 4.3 ms for 57 million weights; a single row loses a tenth. */
enum { PANEL = 32, MOST_ROWS = 12, MOST_INT8_ROWS = 8, AHEAD = 8192, FAR_AHEAD = 16384, MANY_ROWS = 8, COARSE = 127 };

typedef struct {
    const void *weight;
    const float *scale; /* of each output, int8 only */
    const float *bias;  /* of each output, or NULL */
    const int32_t *start; /* of each output: -128 times the sum of its weights, for inputs of 8 bits */
    int64_t inputs;     /* a multiple of 2 */
    int64_t outputs;
    int64_t limit; /* largest magnitude of a rounded input; COARSE: of 8 bits; 0: bf16 */
    int64_t gated; /* 1: a panel has 16 gates g and 16 values u, and the output is silu(g) u */
} Product;

/* Converts a row of fp32 numbers, a multiple of 16, to what the product reads. */
INLINE void encode(const float *row, int64_t count, int64_t limit, uint16_t *code, float *scale) {
    if (!limit) {
        for (int64_t i = 0; i < count; i += 16)
            _mm256_storeu_si256((__m256i *)(code + i), to_bf16(_mm512_loadu_ps(row + i)));
        return;
    }
    __m512 most = _mm512_set1_ps(1e-30f);
    for (int64_t i = 0; i < count; i += 16) most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(row + i)));
    *scale = _mm512_reduce_max_ps(most) / (float)limit;
    __m512 inverse = _mm512_set1_ps(1.0f / *scale);
    for (int64_t i = 0; i < count; i += 16) {
        __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(row + i), inverse));
        if (limit == COARSE)
            _mm_storeu_si128(
                (__m128i *)((uint8_t *)code + i), _mm512_cvtusepi32_epi8(_mm512_add_epi32(rounded, _mm512_set1_epi32(128))));
        else _mm256_storeu_si256((__m256i *)(code + i), _mm512_cvtsepi32_epi16(rounded));
    }
}

/* One panel for `rows` rows of x (a constant at each call). add: whether the product is added to y. codes: where gated outputs
   go in bf16 instead of y, or NULL. */
INLINE void tile(
    const Product *product, int64_t panel, int rows, const uint16_t *x, const float *scales, float *y, uint16_t *codes,
    int add) {
    const int64_t pairs = product->inputs / 2;
    __m512 result[MOST_ROWS][2];
    if (product->limit) {
        const int8_t *w = (const int8_t *)product->weight + panel * pairs * 2 * PANEL;
        const int coarse = product->limit == COARSE;
        const int32_t *start = coarse ? product->start + panel * PANEL : NULL;
        __m512i sum[MOST_ROWS][2];
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            sum[r][0] = coarse ? _mm512_loadu_si512(start) : _mm512_setzero_si512();
            sum[r][1] = coarse ? _mm512_loadu_si512(start + 16) : _mm512_setzero_si512();
        }
        for (int64_t k = 0; coarse && k < pairs / 2; k++, w += 4 * PANEL) {
            __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 2 * PANEL);
            _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)w + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                __m512i four = _mm512_set1_epi32(((const int32_t *)x)[r * pairs + k]);
                sum[r][0] = dot_int8(sum[r][0], w0, four);
                sum[r][1] = dot_int8(sum[r][1], w1, four);
            }
        }
        for (int64_t k = 0; !coarse && k < pairs; k++, w += 2 * PANEL) {
            __m512i w0 = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)w));
            __m512i w1 = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(w + PANEL)));
            _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                __m512i pair = _mm512_set1_epi32(((const int32_t *)x)[r * pairs + k]);
                sum[r][0] = dot_int16(sum[r][0], w0, pair);
                sum[r][1] = dot_int16(sum[r][1], w1, pair);
            }
        }
        __m512 s0 = _mm512_loadu_ps(product->scale + panel * PANEL), s1 = _mm512_loadu_ps(product->scale + panel * PANEL + 16);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            __m512 scale = _mm512_set1_ps(scales[r]);
            result[r][0] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][0]), _mm512_mul_ps(s0, scale));
            result[r][1] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][1]), _mm512_mul_ps(s1, scale));
        }
    } else {
        const uint16_t *w = (const uint16_t *)product->weight + panel * pairs * 2 * PANEL;
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) result[r][0] = result[r][1] = _mm512_setzero_ps();
        for (int64_t k = 0; k < pairs; k++, w += 2 * PANEL) {
            __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + PANEL);
            if (rows >= MANY_ROWS) {
                _mm_prefetch((const char *)w + FAR_AHEAD, _MM_HINT_T1);
                _mm_prefetch((const char *)w + FAR_AHEAD + 64, _MM_HINT_T1);
            } else {
                _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
                _mm_prefetch((const char *)w + AHEAD + 64, _MM_HINT_T0);
            }
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                __m512i pair = _mm512_set1_epi32(((const int32_t *)x)[r * pairs + k]);
                result[r][0] = dot_bf16(result[r][0], w0, pair);
                result[r][1] = dot_bf16(result[r][1], w1, pair);
            }
        }
    }
    if (product->bias) {
        __m512 b0 = _mm512_loadu_ps(product->bias + panel * PANEL), b1 = _mm512_loadu_ps(product->bias + panel * PANEL + 16);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            result[r][0] = _mm512_add_ps(result[r][0], b0);
            result[r][1] = _mm512_add_ps(result[r][1], b1);
        }
    }
    const int64_t stride = product->outputs;
    if (product->gated) {
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const __m512 gated = _mm512_mul_ps(silu(result[r][0]), result[r][1]);
            if (codes) _mm256_storeu_si256((__m256i *)(codes + r * stride + panel * 16), to_bf16(gated));
            else _mm512_storeu_ps(y + r * stride + panel * 16, gated);
        }
        return;
    }
    const int64_t left = stride - panel * PANEL;
    const __mmask16 m0 = left >= 16 ? 0xffff : (1u << left) - 1;
    const __mmask16 m1 = left >= 32 ? 0xffff : left > 16 ? (1u << (left - 16)) - 1 : 0;
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        float *to = y + r * stride + panel * PANEL;
        if (add) {
            result[r][0] = _mm512_add_ps(result[r][0], _mm512_maskz_loadu_ps(m0, to));
            result[r][1] = _mm512_add_ps(result[r][1], _mm512_maskz_loadu_ps(m1, to + 16));
        }
        _mm512_mask_storeu_ps(to, m0, result[r][0]);
        _mm512_mask_storeu_ps(to + 16, m1, result[r][1]);
    }
}

/* This thread's share of the panels, for encoded rows x. codes: as of `tile`. */
static void multiply(
    const Product *product, int64_t rows, const uint16_t *x, const float *scales, float *y, uint16_t *codes, int add,
    int thread, int threads) {
    const int64_t width = product->gated ? PANEL / 2 : PANEL;
    const int64_t panels = (product->outputs + width - 1) / width;
    const int64_t most = product->limit ? MOST_INT8_ROWS : MOST_ROWS, tiles = (rows + most - 1) / most;
    for (int64_t panel = panels * thread / threads; panel < panels * (thread + 1) / threads; panel++) {
        for (int64_t i = 0; i < tiles; i++) {
            const int64_t first = rows * i / tiles, count = rows * (i + 1) / tiles - first;
            const uint16_t *from = x + first * product->inputs;
            float *to = y + first * product->outputs;
            uint16_t *to_codes = codes ? codes + first * product->outputs : NULL;
            switch (count) {
#define CASE(N) case N: tile(product, panel, N, from, scales + first, to, to_codes, add); break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
            }
        }
    }
}
