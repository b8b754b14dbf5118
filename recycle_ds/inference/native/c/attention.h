/* Attention of one token over a paged cache.

   A block holds 16 positions of one layer: first the keys of every head, [C / 2][16 positions][2], so that one vector has a
   channel pair of all positions and scores need no sums across lanes; then the values, [8][C][2 positions]. Scores and
   sums are fp32, probabilities bf16. A token's result does not depend on the other tokens of the pass.

   In a tree of drafts a token may see entries of which some lie in other slots than those of their positions. It then attends
   to a copy of the blocks concerned, with each entry in its position's lane: its sums are those of a linear context. */
#pragma once

#include <math.h>
#include <string.h>

#include "vectors.h"

/* POSITIONS_AHEAD: how far ahead the cache is prefetched. Its blocks lie apart, so the processor does not foresee them. Measured
   on one core of an AMD EPYC of the fourth generation, 8 tokens with 800 positions each, a model of 100 million weights without
   its head: 29 ms without prefetching, 25.5 ms into the first-level cache, 21.0 ms into the second-level one, 20.1 ms so and
   with a cache in huge pages. */
enum { BLOCK = 16, MOST_GROUPS = 4, POSITIONS_AHEAD = 3 * BLOCK };

typedef struct {
    uint16_t *cache;       /* of one layer */
    const int32_t *blocks; /* of the sequence */
    int64_t lowest, at;    /* first and last visible position */
    int64_t slot;          /* of the token itself */
    int64_t kv_heads, channels;
    const int32_t *path; /* slots of the positions from `moved` to `at`; before, slots are positions */
    int64_t moved;       /* after `at`: none */
    uint16_t *copies;    /* the blocks from that of `moved` on, of one head: its keys, its values */
} View;

INLINE uint16_t *block_of(const View *view, int64_t slot, int64_t head, int values) {
    const int64_t size = BLOCK * view->channels;
    return view->cache + ((int64_t)view->blocks[slot / BLOCK] * 2 * view->kv_heads + (values ? view->kv_heads : 0) + head) * size;
}

/* The copy of the block of a position from `moved`'s block on. */
INLINE uint16_t *copy_of(const View *view, int64_t position, int values) {
    return view->copies + ((position / BLOCK - view->moved / BLOCK) * 2 + values) * BLOCK * view->channels;
}

/* The block of a visible position, with the entries that the token sees. */
INLINE const uint16_t *seen_block(const View *view, int64_t position, int64_t head, int values) {
    return position < view->moved / BLOCK * BLOCK ? block_of(view, position, head, values) : copy_of(view, position, values);
}

/* Copies the blocks of which some entries lie elsewhere. What other lanes contain is masked as in the cache itself. */
static void gather(const View *view, int64_t head) {
    const int64_t channels = view->channels;
    for (int64_t at = view->moved / BLOCK * BLOCK; at <= view->at; at += BLOCK)
        for (int values = 0; values < 2; values++)
            memcpy(copy_of(view, at, values), block_of(view, at, head, values), BLOCK * channels * 2);
    for (int64_t at = view->moved; at <= view->at; at++) {
        const int64_t slot = view->path[at - view->moved], from = slot % BLOCK, to = at % BLOCK;
        const uint16_t *keys = block_of(view, slot, head, 0), *values = block_of(view, slot, head, 1);
        uint16_t *own_keys = copy_of(view, at, 0), *own_values = copy_of(view, at, 1);
        for (int64_t c = 0; c < channels; c++) {
            own_keys[c / 2 * 2 * BLOCK + to * 2 + c % 2] = keys[c / 2 * 2 * BLOCK + from * 2 + c % 2];
            own_values[to / 2 * 2 * channels + c * 2 + to % 2] = values[from / 2 * 2 * channels + c * 2 + from % 2];
        }
    }
}

/* Stores the token's key (fp32, C). */
static void store_key(const View *view, int64_t head, const float *key) {
    uint32_t *keys = (uint32_t *)block_of(view, view->slot, head, 0) + view->slot % BLOCK;
    for (int64_t c = 0; c < view->channels; c += 16) {
        uint32_t pairs[8];
        _mm256_storeu_si256((__m256i *)pairs, to_bf16(_mm512_loadu_ps(key + c)));
        for (int64_t i = 0; i < 8; i++) keys[(c / 2 + i) * BLOCK] = pairs[i];
    }
}

/* Stores the token's value (fp32, C). */
static void store_value(const View *view, int64_t head, const float *value) {
    const int64_t lane = view->slot % BLOCK;
    uint16_t *values = block_of(view, view->slot, head, 1) + lane / 2 * 2 * view->channels + lane % 2;
    for (int64_t c = 0; c < view->channels; c += 16) {
        uint16_t v[16];
        _mm256_storeu_si256((__m256i *)v, to_bf16(_mm512_loadu_ps(value + c)));
        for (int64_t i = 0; i < 16; i++) values[(c + i) * 2] = v[i];
    }
}

/* What is read POSITIONS_AHEAD positions after the keys at `at`: other keys, or the first values. */
INLINE const uint16_t *block_ahead(const View *view, int64_t head, int64_t first, int64_t at) {
    const int64_t next = at + POSITIONS_AHEAD, over = next - view->at - 1;
    if (over < 0) return seen_block(view, next, head, 0);
    const int64_t value = first + over / BLOCK * BLOCK; /* of a short text there are none that far */
    return seen_block(view, value <= view->at ? value : first, head, 1);
}

/* `vectors` times 16 channels of the sums of values weighted by probabilities. */
INLINE void weigh(
    const View *view, int64_t head, int groups, int vectors, int64_t channel, const uint16_t *probabilities, int64_t stride,
    const float *totals, float *mixed, uint16_t *codes) {
    const int64_t first = view->lowest / BLOCK * BLOCK;
    __m512 sum[MOST_GROUPS][4];
#pragma GCC unroll 4
    for (int g = 0; g < groups; g++)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) sum[g][i] = _mm512_setzero_ps();
    for (int64_t at = view->lowest / 2 * 2; at <= view->at; at += 2) {
        const uint16_t *values = seen_block(view, at, head, 1) + at % BLOCK * view->channels + channel * 2;
        /* memory that was never written may contain NaN, which a probability of 0 would not remove */
        const int32_t kept = (at < view->lowest ? 0 : 0xffff) | (at + 1 > view->at ? 0 : 0xffff0000);
        if (at + POSITIONS_AHEAD <= view->at) {
            const uint16_t *next = seen_block(view, at + POSITIONS_AHEAD, head, 1) + at % BLOCK * view->channels + channel * 2;
            for (int i = 0; i < vectors; i++) _mm_prefetch((const char *)(next + 32 * i), _MM_HINT_T1);
        }
        __m512i v[4];
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++)
            v[i] = _mm512_and_si512(_mm512_loadu_si512(values + 32 * i), _mm512_set1_epi32(kept));
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) {
            __m512i pair = _mm512_set1_epi32(*(const int32_t *)(probabilities + g * stride + at - first));
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) sum[g][i] = dot_bf16(sum[g][i], v[i], pair);
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < groups; g++)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            const int64_t at = g * view->channels + channel + 16 * i;
            const __m512 mean = _mm512_div_ps(sum[g][i], _mm512_set1_ps(totals[g]));
            if (codes) _mm256_storeu_si256((__m256i *)(codes + at), to_bf16(mean));
            else _mm512_storeu_ps(mixed + at, mean);
        }
}

/* Attends with `groups` query heads (bf16, C each; a constant at each call) of one key/value head. Writes fp32 [groups, C], or
   the same in bf16 to `codes`, if it is not NULL.
   scores: room for groups x stride numbers, probabilities likewise; stride: visible positions, rounded up. */
INLINE void attend_groups(
    const View *view, int64_t head, int groups, const uint16_t *query, float *mixed, uint16_t *codes, float *scores,
    uint16_t *probabilities, int64_t stride) {
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf((float)view->channels)), none = _mm512_set1_ps(-INFINITY);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const int64_t first = view->lowest / BLOCK * BLOCK, pairs = view->channels / 2;
    __m512 most[MOST_GROUPS];
#pragma GCC unroll 4
    for (int g = 0; g < groups; g++) most[g] = none;
    for (int64_t at = first; at <= view->at; at += BLOCK) {
        const uint16_t *keys = seen_block(view, at, head, 0), *next = block_ahead(view, head, first, at);
        __m512 sum[MOST_GROUPS][2];
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) sum[g][0] = sum[g][1] = _mm512_setzero_ps();
        for (int64_t c = 0; c < pairs; c += 2) {
            _mm_prefetch((const char *)(next + c * 2 * BLOCK), _MM_HINT_T1);
            _mm_prefetch((const char *)(next + (c + 1) * 2 * BLOCK), _MM_HINT_T1);
            __m512i k0 = _mm512_loadu_si512(keys + c * 2 * BLOCK), k1 = _mm512_loadu_si512(keys + (c + 1) * 2 * BLOCK);
#pragma GCC unroll 4
            for (int g = 0; g < groups; g++) {
                const int32_t *q = (const int32_t *)query + g * pairs + c;
                sum[g][0] = dot_bf16(sum[g][0], k0, _mm512_set1_epi32(q[0]));
                sum[g][1] = dot_bf16(sum[g][1], k1, _mm512_set1_epi32(q[1]));
            }
        }
        const __m512i positions = _mm512_add_epi32(lanes, _mm512_set1_epi32((int32_t)at));
        const __mmask16 seen = _mm512_cmple_epi32_mask(_mm512_set1_epi32((int32_t)view->lowest), positions) &
                               _mm512_cmple_epi32_mask(positions, _mm512_set1_epi32((int32_t)view->at));
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) {
            __m512 s = _mm512_mul_ps(_mm512_add_ps(sum[g][0], sum[g][1]), scale);
            s = _mm512_mask_mov_ps(none, seen, s);
            most[g] = _mm512_max_ps(most[g], s);
            _mm512_storeu_ps(scores + g * stride + at - first, s);
        }
    }
    float totals[MOST_GROUPS];
#pragma GCC unroll 4
    for (int g = 0; g < groups; g++) {
        const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(most[g]));
        __m512 total = _mm512_setzero_ps();
        for (int64_t at = first; at <= view->at; at += BLOCK) {
            __m512 s = _mm512_loadu_ps(scores + g * stride + at - first);
            const __mmask16 seen = _mm512_cmp_ps_mask(s, none, _CMP_NEQ_UQ);
            __m512 p = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(s, highest)));
            total = _mm512_add_ps(total, p);
            _mm256_storeu_si256((__m256i *)(probabilities + g * stride + at - first), to_bf16(p));
        }
        totals[g] = _mm512_reduce_add_ps(total);
    }
    int64_t channel = 0;
    for (; channel + 64 <= view->channels; channel += 64)
        weigh(view, head, groups, 4, channel, probabilities, stride, totals, mixed, codes);
    for (; channel < view->channels; channel += 16)
        weigh(view, head, groups, 1, channel, probabilities, stride, totals, mixed, codes);
}

/* Attends with all query heads of one key/value head, to the entries that have been stored for all tokens. */
static void attend(
    const View *view, int64_t head, int64_t groups, const uint16_t *query, float *mixed, uint16_t *codes,
    float *scores, uint16_t *probabilities, int64_t stride) {
    if (view->moved <= view->at) gather(view, head);
    for (int64_t g = 0; g < groups; g += MOST_GROUPS) {
        const uint16_t *from = query + g * view->channels;
        float *to = mixed + g * view->channels;
        uint16_t *to_codes = codes ? codes + g * view->channels : NULL;
        switch (groups - g) {
            case 1: attend_groups(view, head, 1, from, to, to_codes, scores, probabilities, stride); break;
            case 2: attend_groups(view, head, 2, from, to, to_codes, scores, probabilities, stride); break;
            case 3: attend_groups(view, head, 3, from, to, to_codes, scores, probabilities, stride); break;
            default: attend_groups(view, head, 4, from, to, to_codes, scores, probabilities, stride); break;
        }
    }
}
