/* Choice of tokens by an output head. A thread computes a few outputs of all rows at a time and reduces them while they are
   in its cache, so that no logits go through memory. The outputs are those of `multiply`, bit for bit, and what is found does
   not depend on the number of rows or threads. The Python side is heads.py. */
#pragma once

#include <math.h>
#include <omp.h>

#include "choice.h"
#include "exchange.h"
#include "products.h"

/* CHUNK: outputs that are reduced together, a multiple of PANEL */
enum { CHUNK = 128 };

typedef struct {
    Product product;
    const int64_t *ids;    /* token ids of the outputs, ascending; NULL: 0, 1, ... */
    const int64_t *barred; /* outputs that are never chosen, ascending */
    int64_t barred_count;
} Head;

typedef struct {
    int64_t rows, count, threads; /* count: tokens to find in each row, at most the outputs that are not barred */
    const uint16_t *x;            /* bf16 [rows, inputs] */
    const float *factors;         /* [rows]: what logits are multiplied by before their log-sum-exp; NULL: 1 */
    int64_t *ids;                 /* [rows, count], the likeliest first, among equal ones the lowest id */
    float *log_probabilities;     /* [rows, count], or NULL */
    char *room;                   /* recycle_ds_choice_room(...) bytes */
    const int64_t *keys;          /* [rows], or NULL: of the random numbers that a row's token is sampled with, 0 for none */
} Choice;

typedef struct {
    float *scales, *highest, *sums; /* highest, sums: of each row and chunk */
    uint16_t *codes;
    char *own; /* of the first thread */
    int64_t own_size, chunks;
    float *row, *logits, *values; /* of a thread */
    int64_t *outputs;
} ChoiceRoom;

static void divide_choice(const Head *head, const Choice *choice, int thread, ChoiceRoom *room) {
    const int64_t rows = choice->rows, inputs = head->product.inputs, found = rows * choice->count;
    char *at = choice->room;
    room->chunks = (head->product.outputs + CHUNK - 1) / CHUNK;
    room->scales = (float *)take(&at, rows * 4);
    room->highest = (float *)take(&at, rows * room->chunks * 4);
    room->sums = (float *)take(&at, rows * room->chunks * 4);
    room->codes = (uint16_t *)take(&at, rows * inputs * 2);
    room->own = at;
    room->own_size = padded(inputs * 4) + padded(rows * CHUNK * 4) + padded(found * 4) + padded(found * 8);
    at += thread * room->own_size;
    room->row = (float *)take(&at, inputs * 4);
    room->logits = (float *)take(&at, rows * CHUNK * 4);
    room->values = (float *)take(&at, found * 4);
    room->outputs = (int64_t *)take(&at, found * 8);
}

/* Bytes that a choice needs in `room`. */
int64_t recycle_ds_choice_room(const Head *head, const Choice *choice) {
    ChoiceRoom room;
    divide_choice(head, choice, 0, &room);
    return room.own + room.own_size * choice->threads - choice->room;
}

/* Puts a value that is higher than the last of `count` descending ones into its place, after equal ones. */
INLINE void insert(float value, int64_t output, int64_t count, float *values, int64_t *outputs) {
    int64_t i = count - 1;
    for (; i > 0 && value > values[i - 1]; i--) values[i] = values[i - 1], outputs[i] = outputs[i - 1];
    values[i] = value, outputs[i] = output;
}

/* 16 of `size` numbers from the i-th on; -inf after the last one. */
INLINE __m512 some_of(const float *x, int64_t i, int64_t size) {
    const __mmask16 present = size - i >= 16 ? 0xffff : (1u << (size - i)) - 1;
    return _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), present, x + i);
}

static void find_highest(const float *logits, int64_t size, int64_t first, int64_t count, float *values, int64_t *outputs) {
    for (int64_t i = 0; i < size; i += 16) {
        unsigned higher = _mm512_cmp_ps_mask(some_of(logits, i, size), _mm512_set1_ps(values[count - 1]), _CMP_GT_OQ);
        for (; higher; higher &= higher - 1) {
            const int64_t at = i + __builtin_ctz(higher);
            if (logits[at] > values[count - 1]) insert(logits[at], first + at, count, values, outputs);
        }
    }
}

/* The highest of the scaled logits, and the sum of exponentials of their distances to it. */
static void sum_exponentials(const float *logits, int64_t size, float factor, float *highest, float *sum) {
    const __m512 none = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(factor);
    __m512 most = none, total = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) most = _mm512_max_ps(most, _mm512_mul_ps(some_of(logits, i, size), scale));
    *highest = _mm512_reduce_max_ps(most);
    most = _mm512_set1_ps(*highest);
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 x = _mm512_mul_ps(some_of(logits, i, size), scale);
        const __mmask16 present = _mm512_cmp_ps_mask(x, none, _CMP_NEQ_UQ);
        total = _mm512_mask_add_ps(total, present, total, exponential(_mm512_sub_ps(x, most)));
    }
    *sum = _mm512_reduce_add_ps(total);
}

/* What a row's logits are still to be multiplied by: those with noise have been. */
INLINE float factor_of(const Choice *choice, int64_t row) {
    return !choice->factors || (choice->keys && choice->keys[row]) ? 1.0f : choice->factors[row];
}

/* Logits of the outputs first, first + 1, ..., scaled, plus the numbers that make sampling a maximum: -log of the clocks. */
static void add_noise(const Head *head, int64_t first, int64_t size, float factor, int64_t key, float *logits) {
    for (int64_t i = 0; i < size; i += 16) {
        const __mmask16 left = lanes_left(size - i);
        const __mmask8 upper = (__mmask8)(left >> 8);
        __m512 clock;
        if (head->ids) {
            const int64_t *ids = head->ids + first + i;
            clock = clocks_of(key, _mm512_maskz_loadu_epi64((__mmask8)left, ids), _mm512_maskz_loadu_epi64(upper, ids + 8));
        } else clock = exponential_clock(uniforms(key, first + i));
        const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(left, logits + i), _mm512_set1_ps(factor));
        /* a clock that never rings is at infinity, whose logarithm is not computed */
        const __m512 latest = _mm512_min_ps(clock, _mm512_set1_ps(1e30f));
        _mm512_mask_storeu_ps(logits + i, left, _mm512_sub_ps(scaled, logarithm(latest)));
    }
}

/* One row: joins what the threads found. */
static void join(const Head *head, const Choice *choice, const ChoiceRoom *room, int64_t row, int threads) {
    const int64_t count = choice->count, offset = row * count;
    ChoiceRoom first, other;
    divide_choice(head, choice, 0, &first);
    for (int thread = 1; thread < threads; thread++) {
        divide_choice(head, choice, thread, &other);
        for (int64_t i = 0; i < count && other.values[offset + i] > first.values[offset + count - 1]; i++)
            insert(other.values[offset + i], other.outputs[offset + i], count, first.values + offset, first.outputs + offset);
    }
    for (int64_t i = offset; i < offset + count; i++)
        choice->ids[i] = head->ids ? head->ids[first.outputs[i]] : first.outputs[i];
    if (!choice->log_probabilities) return;
    const float *highest = room->highest + row * room->chunks, *sums = room->sums + row * room->chunks;
    const float factor = factor_of(choice, row), most = first.values[offset] * factor;
    float total = 0;
    for (int64_t i = 0; i < room->chunks; i++)
        if (highest[i] > -INFINITY) total += sums[i] * expf(highest[i] - most);
    for (int64_t i = offset; i < offset + count; i++)
        choice->log_probabilities[i] = first.values[i] * factor - most - logf(total);
}

/* The likeliest tokens of each row and their log probabilities over the outputs that are not barred. */
void recycle_ds_choose(const Head *head, const Choice *choice) {
    const Product *product = &head->product;
    const int64_t rows = choice->rows, count = choice->count, inputs = product->inputs;
    Barrier all = {0}, *barrier = &all;
#pragma omp parallel num_threads((int)choice->threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        ChoiceRoom room;
        divide_choice(head, choice, thread, &room);
        for (int64_t r = thread; r < rows; r += threads) {
            widen(choice->x + r * inputs, inputs, room.row);
            encode(room.row, inputs, product->limit, room.codes + r * inputs, room.scales + r);
        }
        for (int64_t i = 0; i < rows * count; i++) room.values[i] = -INFINITY, room.outputs[i] = 0;
        wait_for_all(barrier, threads);
        const int64_t end = room.chunks * (thread + 1) / threads, bytes = product->limit ? 1 : 2;
        int64_t chunk = room.chunks * thread / threads, barred = 0;
        for (; chunk < end; chunk++) {
            const int64_t first = chunk * CHUNK, left = product->outputs - first, size = left < CHUNK ? left : CHUNK;
            Product part = *product;
            part.weight = (const char *)product->weight + first * inputs * bytes;
            part.scale = product->scale ? product->scale + first : 0;
            part.bias = product->bias ? product->bias + first : 0;
            part.start = product->start ? product->start + first : 0;
            part.outputs = size;
            multiply(&part, rows, room.codes, room.scales, room.logits, NULL, 0, 0, 1);
            while (barred < head->barred_count && head->barred[barred] < first) barred++;
            for (; barred < head->barred_count && head->barred[barred] < first + size; barred++)
                for (int64_t r = 0; r < rows; r++) room.logits[r * size + head->barred[barred] - first] = -INFINITY;
            for (int64_t r = 0; r < rows; r++) {
                float *logits = room.logits + r * size;
                if (choice->keys && choice->keys[r])
                    add_noise(head, first, size, choice->factors ? choice->factors[r] : 1.0f, choice->keys[r], logits);
                find_highest(logits, size, first, count, room.values + r * count, room.outputs + r * count);
                if (!choice->log_probabilities) continue;
                const int64_t at = r * room.chunks + chunk;
                sum_exponentials(logits, size, factor_of(choice, r), room.highest + at, room.sums + at);
            }
        }
        wait_for_all(barrier, threads);
        for (int64_t r = thread; r < rows; r += threads) join(head, choice, &room, r, threads);
    }
}
