/* Sampling from rows of logits with counter-based random numbers: temperature, top-k, top-p, min-p and the race of
   exponential clocks, as in speculation/sampling.py and noise.py. A row's token depends on nothing but the row. */
#pragma once

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "exchange.h"
#include "vectors.h"

/* Parts of a row that threads share. The result does not depend on their number: it is a maximum. */
enum { PARTS = 8 };

typedef struct {
    float inverse; /* of the temperature */
    float top_p, min_p;
    int64_t top_k; /* 0: all */
    int64_t key;
} Rule;

typedef struct {
    float highest[PARTS];
    float limit; /* tokens with a smaller logit, divided by the temperature, are never chosen */
    float score[PARTS];
    int64_t winner[PARTS];
} Race;

/* Natural logarithm of positive normal numbers, to about 2 units in the last place. */
INLINE __m512 logarithm(__m512 x) {
    __m512 exponent = _mm512_getexp_ps(x), m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    const __mmask16 upper = _mm512_cmp_ps_mask(m, _mm512_set1_ps(1.41421356f), _CMP_GT_OQ);
    m = _mm512_mask_mul_ps(m, upper, m, _mm512_set1_ps(0.5f));
    exponent = _mm512_mask_add_ps(exponent, upper, exponent, _mm512_set1_ps(1.0f));
    const __m512 r = _mm512_sub_ps(m, _mm512_set1_ps(1.0f)), square = _mm512_mul_ps(r, r);
    __m512 p = _mm512_set1_ps(7.0376836292e-2f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(-1.1514610310e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.1676998740e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(-1.2420140846e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.4249322787e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(-1.6668057665e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.0000714765e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(-2.4999993993e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(3.3333331174e-1f));
    p = _mm512_mul_ps(_mm512_mul_ps(p, r), square);
    p = _mm512_fmadd_ps(exponent, _mm512_set1_ps(-2.12194440e-4f), p);
    p = _mm512_fnmadd_ps(square, _mm512_set1_ps(0.5f), p);
    return _mm512_fmadd_ps(exponent, _mm512_set1_ps(0.693359375f), _mm512_add_ps(r, p));
}

/* -log(1 - u), u between 2^-33 and 1. */
INLINE __m512 exponential_clock(__m512 u) {
    const __m512 one = _mm512_set1_ps(1.0f), rest = _mm512_sub_ps(one, u);
    const __m512 rounded = _mm512_sub_ps(one, rest); /* what of u is left in 1 - u */
    __m512 clock = _mm512_sub_ps(_mm512_setzero_ps(), logarithm(rest));
    clock = _mm512_mul_ps(clock, _mm512_div_ps(u, rounded));
    clock = _mm512_mask_mov_ps(clock, _mm512_cmp_ps_mask(rounded, _mm512_setzero_ps(), _CMP_EQ_OQ), u);
    const __mmask16 never = _mm512_cmp_ps_mask(rest, _mm512_setzero_ps(), _CMP_LE_OQ);
    return _mm512_mask_mov_ps(clock, never, _mm512_set1_ps(INFINITY));
}

/* SplitMix64's output for 8 counters; its high 32 bits. */
INLINE __m256i mixed_bits(__m512i z) {
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)), _mm512_set1_epi64(0xBF58476D1CE4E5B9));
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)), _mm512_set1_epi64(0x94D049BB133111EB));
    z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
    return _mm512_cvtepi64_epi32(_mm512_srli_epi64(z, 32));
}

/* Uniform random numbers, between 2^-33 and 1, of 16 token ids. */
INLINE __m512 uniforms_of(int64_t key, __m512i low, __m512i high) {
    const __m512i step = _mm512_set1_epi64(0x9E3779B97F4A7C15), from = _mm512_set1_epi64(key), one = _mm512_set1_epi64(1);
    const __m256i a = mixed_bits(_mm512_add_epi64(from, _mm512_mullo_epi64(_mm512_add_epi64(low, one), step)));
    const __m256i b = mixed_bits(_mm512_add_epi64(from, _mm512_mullo_epi64(_mm512_add_epi64(high, one), step)));
    const __m512 bits = _mm512_cvtepu32_ps(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
    return _mm512_mul_ps(_mm512_add_ps(bits, _mm512_set1_ps(0.5f)), _mm512_set1_ps(0x1p-32f));
}

/* Their clocks. */
INLINE __m512 clocks_of(int64_t key, __m512i low, __m512i high) { return exponential_clock(uniforms_of(key, low, high)); }

/* The same numbers for consecutive ids. */
INLINE __m512 uniforms(int64_t key, int64_t id) {
    const __m512i low = _mm512_add_epi64(_mm512_set1_epi64(id), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    return uniforms_of(key, low, _mm512_add_epi64(low, _mm512_set1_epi64(8)));
}

static void part_of(int64_t count, int64_t part, int64_t *from, int64_t *to) {
    const int64_t vectors = (count + 15) / 16;
    *from = vectors * part / PARTS * 16;
    *to = vectors * (part + 1) / PARTS * 16;
    if (*to > count) *to = count;
}

INLINE __mmask16 lanes_left(int64_t left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

static void find_peak(const float *logits, int64_t count, int64_t part, Race *race) {
    int64_t from, to;
    part_of(count, part, &from, &to);
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t i = from; i < to; i += 16) {
        const __mmask16 left = lanes_left(to - i);
        most = _mm512_mask_max_ps(most, left, most, _mm512_maskz_loadu_ps(left, logits + i));
    }
    race->highest[part] = _mm512_reduce_max_ps(most);
}

static float peak_of(const Race *race) {
    float most = race->highest[0];
    for (int part = 1; part < PARTS; part++) most = race->highest[part] > most ? race->highest[part] : most;
    return most;
}

static int descending(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* Collects the scaled logits of at least `lowest`, relative to the highest one, in `room`. Returns their number; in `below`
   the sum of the others' exponentials. */
static int64_t collect(
    const float *logits, int64_t count, float inverse, float highest, float lowest, float *room, double *below) {
    const __m512 most = _mm512_set1_ps(highest), scale = _mm512_set1_ps(inverse), least = _mm512_set1_ps(lowest);
    __m512 rest = _mm512_setzero_ps();
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 left = lanes_left(count - i);
        const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(left, logits + i), most), scale);
        const __mmask16 finite = _mm512_mask_cmp_ps_mask(left, x, _mm512_set1_ps(-FLT_MAX), _CMP_GE_OQ);
        const __mmask16 near = _mm512_mask_cmp_ps_mask(finite, x, least, _CMP_GE_OQ);
        _mm512_mask_compressstoreu_ps(room + kept, near, x);
        kept += __builtin_popcount(near);
        rest = _mm512_mask_add_ps(rest, finite & ~near, rest, exponential(x));
    }
    *below = _mm512_reduce_add_ps(rest);
    return kept;
}

/* The smallest scaled logit, relative to the highest one, that top-k, top-p and min-p keep. room: `count` numbers. */
static float find_limit(const float *logits, int64_t count, const Rule *rule, float highest, float *room) {
    float limit = rule->min_p > 0 ? logf(rule->min_p) : -FLT_MAX; /* logits of -inf are never chosen */
    const int64_t most = rule->top_k;
    if (most == 0 && rule->top_p >= 1) return limit;
    /* few tokens are near the highest one: mostly these are enough, and sorting all is left to flat distributions */
    for (float lowest = -4.0f;; lowest = lowest > -16.0f ? 2 * lowest : -FLT_MAX) {
        double below;
        int64_t kept = collect(logits, count, rule->inverse, highest, lowest, room, &below);
        const int all = lowest == -FLT_MAX;
        if (most > kept && !all) continue;
        qsort(room, kept, sizeof(float), descending);
        if (most && kept >= most) { /* top-k removes the others */
            int64_t last = most; /* with all that equal the last one */
            while (last < kept && room[last] == room[most - 1]) last++;
            kept = last, below = 0;
        }
        if (most && kept && room[kept - 1] > limit) limit = room[kept - 1];
        if (rule->top_p >= 1) return limit;
        double total = below, reached = 0;
        for (int64_t i = 0; i < kept; i++) total += exp(room[i]);
        for (int64_t i = 0; i < kept; i++) {
            reached += exp(room[i]);
            if (reached >= rule->top_p * total) return room[i] > limit ? room[i] : limit;
        }
        if (all) return limit;
    }
}

static void run_race(const float *logits, int64_t count, int64_t first, const Rule *rule, int64_t part, Race *race) {
    int64_t from, to;
    part_of(count, part, &from, &to);
    const __m512 highest = _mm512_set1_ps(peak_of(race)), inverse = _mm512_set1_ps(rule->inverse);
    const __m512 limit = _mm512_set1_ps(race->limit);
    __m512 best = _mm512_set1_ps(-1.0f), lead = best; /* best of each lane; 0.999 of the best of all */
    __m512i at = _mm512_setzero_si512();
    for (int64_t i = from; i < to; i += 16) {
        const __mmask16 left = lanes_left(to - i);
        const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(left, logits + i), highest), inverse);
        const __mmask16 kept = _mm512_mask_cmp_ps_mask(left, x, limit, _CMP_GE_OQ);
        if (!kept) continue;
        /* A clock is at least its uniform number, but for rounding, which 0.999 covers: most tokens cannot win, and need no
           logarithm. */
        const __m512 weight = exponential(x), u = uniforms(rule->key, first + i);
        if (!_mm512_mask_cmp_ps_mask(kept, weight, _mm512_mul_ps(lead, u), _CMP_GE_OQ)) continue;
        const __m512 score = _mm512_div_ps(weight, exponential_clock(u));
        const __mmask16 better = _mm512_mask_cmp_ps_mask(kept, score, best, _CMP_GT_OQ);
        if (!better) continue;
        lead = _mm512_max_ps(lead, _mm512_set1_ps(0.999f * _mm512_mask_reduce_max_ps(better, score)));
        best = _mm512_mask_mov_ps(best, better, score);
        at = _mm512_mask_mov_epi32(at, better, _mm512_set1_epi32((int32_t)i));
    }
    float scores[16];
    int32_t places[16];
    _mm512_storeu_ps(scores, best);
    _mm512_storeu_si512(places, at);
    race->score[part] = -1, race->winner[part] = -1;
    for (int lane = 0; lane < 16; lane++) {
        const int64_t id = places[lane] + lane;
        if (scores[lane] > race->score[part] || (scores[lane] == race->score[part] && scores[lane] >= 0 && id < race->winner[part]))
            race->score[part] = scores[lane], race->winner[part] = id;
    }
}

/* Samples a token for each row. logits: fp32 [rows, count] of the token ids first, first + 1, ...; races: one for each
   row; room: count numbers for each row with limits. Returns in winners the ids, or -1 where nothing can be chosen. */
void recycle_ds_sample(
    const float *logits, int64_t rows, int64_t count, int64_t first, const Rule *rules, Race *races, float *room,
    int64_t *winners, int64_t most) {
    Barrier all = {0}, *barrier = &all;
#pragma omp parallel num_threads((int)most)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (int64_t i = thread; i < rows * PARTS; i += threads)
            find_peak(logits + i / PARTS * count, count, i % PARTS, races + i / PARTS);
        wait_for_all(barrier, threads);
        for (int64_t r = thread; r < rows; r += threads)
            races[r].limit = find_limit(logits + r * count, count, rules + r, peak_of(races + r), room + r * count);
        wait_for_all(barrier, threads);
        for (int64_t i = thread; i < rows * PARTS; i += threads)
            run_race(logits + i / PARTS * count, count, first, rules + i / PARTS, i % PARTS, races + i / PARTS);
        wait_for_all(barrier, threads);
        for (int64_t r = thread; r < rows; r += threads) {
            float score = -1;
            winners[r] = -1;
            for (int part = 0; part < PARTS; part++)
                if (races[r].score[part] > score) score = races[r].score[part], winners[r] = first + races[r].winner[part];
        }
    }
}
