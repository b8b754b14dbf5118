/* The likeliest token of each row by a bf16 head of which not all is read: an int8 copy of the weights bounds every logit, and
   only the outputs whose bound reaches the highest lower one are computed from the bf16 weights, as `multiply` does. What is
   found is what `recycle_ds_choose` finds, bit for bit: of SmolLM2-135M's 49,152 outputs a handful is computed. The
   Python side, which computes the bounds, is screen.py. */
#pragma once

#include <math.h>

#include "heads.h"

/* KEPT: outputs of a row that a thread remembers; if there are more, the whole head is read. */
enum { KEPT = 2048 };

/* Of a shorter row, squares would underflow. */
#define SHORTEST 1e-10

typedef struct {
    const Head *head; /* bf16, without a bias */
    Product product;  /* the same weights in int8 */
    /* [outputs]: with |x| a row's length, the logit of output v differs from that of the int8 product by at most errors[v] |x|,
       if rounding the row has changed it by at most `rounded` |x| */
    const float *errors;
    double rounded;
    double longest; /* a longer row could overflow in sums */
} Screen;

typedef struct {
    float *scales, *lengths; /* of each row */
    uint16_t *codes;
    char *own; /* of the first thread */
    int64_t own_size;
    float *row, *logits, *lowest, *bounds; /* of a thread; lowest: what each row's highest logit reaches at least */
    int64_t *outputs, *counts;
} ScreenRoom;

static void divide_screen(const Screen *screen, const Choice *choice, int thread, ScreenRoom *room) {
    const int64_t rows = choice->rows, inputs = screen->product.inputs;
    char *at = choice->room;
    room->scales = (float *)take(&at, rows * 4);
    room->lengths = (float *)take(&at, rows * 4);
    room->codes = (uint16_t *)take(&at, rows * inputs * 2);
    room->own = at;
    room->own_size = padded(inputs * 4) + padded(rows * CHUNK * 4) + padded(rows * 4) + padded(rows * KEPT * 4) +
                     padded(rows * KEPT * 8) + padded(rows * 8);
    at += thread * room->own_size;
    room->row = (float *)take(&at, inputs * 4);
    room->logits = (float *)take(&at, rows * CHUNK * 4);
    room->lowest = (float *)take(&at, rows * 4);
    room->bounds = (float *)take(&at, rows * KEPT * 4);
    room->outputs = (int64_t *)take(&at, rows * KEPT * 8);
    room->counts = (int64_t *)take(&at, rows * 8);
}

/* Bytes that a choice needs in `room`, whether all of the head is read or not. */
int64_t recycle_ds_screen_room(const Screen *screen, const Choice *choice) {
    ScreenRoom room;
    divide_screen(screen, choice, 0, &room);
    const int64_t needed = room.own + room.own_size * choice->threads - choice->room;
    return largest(needed, recycle_ds_choice_room(screen->head, choice));
}

/* Forgets the outputs that can no longer be a row's likeliest. Returns how many are left. */
static int64_t forget(float lowest, int64_t count, float *bounds, int64_t *outputs) {
    int64_t left = 0;
    for (int64_t i = 0; i < count; i++)
        if (bounds[i] >= lowest) bounds[left] = bounds[i], outputs[left++] = outputs[i];
    return left;
}

/* Of one row's int8 logits of the outputs first, first + 1, ...: keeps those that may be the likeliest. Returns 0 if they are
   too many. */
static int keep(
    const float *logits, const float *errors, int64_t size, int64_t first, float length, const ScreenRoom *room, int64_t r) {
    const __m512 factor = _mm512_set1_ps(length);
    __m512 most = _mm512_set1_ps(room->lowest[r]);
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 error = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes_left(size - i), errors + i), factor);
        most = _mm512_max_ps(_mm512_sub_ps(some_of(logits, i, size), error), most); /* a NaN gives way to the second */
    }
    const float lowest = room->lowest[r] = _mm512_reduce_max_ps(most);
    float *bounds = room->bounds + r * KEPT;
    int64_t *outputs = room->outputs + r * KEPT, count = room->counts[r];
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 error = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes_left(size - i), errors + i), factor);
        const __m512 bound = _mm512_add_ps(some_of(logits, i, size), error);
        const __mmask16 present = _mm512_cmp_ps_mask(bound, _mm512_set1_ps(-INFINITY), _CMP_GT_OQ);
        unsigned likely = _mm512_mask_cmp_ps_mask(present, bound, _mm512_set1_ps(lowest), _CMP_GE_OQ);
        for (; likely; likely &= likely - 1) {
            const int lane = __builtin_ctz(likely);
            if (count == KEPT) count = forget(lowest, count, bounds, outputs);
            if (count == KEPT) return 0;
            bounds[count] = logits[i + lane] + errors[i + lane] * length, outputs[count++] = first + i + lane;
        }
    }
    room->counts[r] = count;
    return 1;
}

/* The logit of one output, as `multiply` computes it. */
static float logit_of(const Product *product, int64_t output, const uint16_t *x) {
    const int64_t panel = output / PANEL, left = product->outputs - panel * PANEL;
    float logits[PANEL];
    Product part = *product;
    part.weight = (const uint16_t *)product->weight + panel * PANEL * product->inputs;
    part.outputs = left < PANEL ? left : PANEL;
    tile(&part, 0, 1, x, NULL, logits, NULL, 0);
    return logits[output % PANEL];
}

/* One row: the likeliest of what the threads have kept. Returns 0 if they have kept nothing, or too much. */
static int judge(const Screen *screen, const Choice *choice, int64_t r, int threads) {
    const Product *product = &screen->head->product;
    const uint16_t *x = choice->x + r * product->inputs;
    float lowest = -INFINITY, highest = -INFINITY, best = -INFINITY;
    int64_t found = -1, first = -1;
    ScreenRoom room;
    for (int thread = 0; thread < threads; thread++) {
        divide_screen(screen, choice, thread, &room);
        lowest = fmaxf(lowest, room.lowest[r]);
        for (int64_t i = r * KEPT; i < r * KEPT + room.counts[r]; i++)
            if (room.bounds[i] > highest) highest = room.bounds[i], first = room.outputs[i];
    }
    if (first < 0) return 0;
    lowest = fmaxf(lowest, logit_of(product, first, x)); /* the likely winner: its logit leaves few others */
    int64_t left = 0;
    for (int thread = 0; thread < threads; thread++) {
        divide_screen(screen, choice, thread, &room);
        for (int64_t i = r * KEPT; i < r * KEPT + room.counts[r]; i++) left += room.bounds[i] >= lowest;
    }
    if (left * PANEL > product->outputs / 4) return 0; /* each costs a panel: all of the head by all threads is faster */
    for (int thread = 0; thread < threads; thread++) { /* outputs are in ascending order: of equal logits the first stays */
        divide_screen(screen, choice, thread, &room);
        for (int64_t i = r * KEPT; i < r * KEPT + room.counts[r]; i++) {
            if (room.bounds[i] < lowest) continue;
            const float logit = logit_of(product, room.outputs[i], x);
            if (logit > best) best = logit, found = room.outputs[i];
            lowest = fmaxf(lowest, best);
        }
    }
    if (found < 0) return 0;
    choice->ids[r] = screen->head->ids ? screen->head->ids[found] : found;
    return 1;
}

/* The likeliest token of each row; choice: with a count of 1, and without log probabilities, keys and factors. */
void recycle_ds_likeliest(const Screen *screen, const Choice *choice) {
    const Head *head = screen->head;
    const int64_t rows = choice->rows, inputs = screen->product.inputs;
    _Atomic int whole = 0; /* whether all of the head must be read after all */
    Barrier all = {0}, *barrier = &all;
#pragma omp parallel num_threads((int)choice->threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        ScreenRoom room;
        divide_screen(screen, choice, thread, &room);
        for (int64_t r = thread; r < rows; r += threads) {
            __m512 squares = _mm512_setzero_ps();
            widen(choice->x + r * inputs, inputs, room.row);
            for (int64_t i = 0; i < inputs; i += 16) {
                const __m512 x = _mm512_loadu_ps(room.row + i);
                squares = _mm512_fmadd_ps(x, x, squares);
            }
            encode(room.row, inputs, screen->product.limit, room.codes + r * inputs, room.scales + r);
            room.lengths[r] = sqrtf(_mm512_reduce_add_ps(squares)) * 1.0001f; /* its own rounding */
            /* an integer is off by a half, and by what its own computation rounds */
            const double rounding = 0.51 * room.scales[r] * sqrt((double)inputs), length = room.lengths[r];
            if (!(rounding <= screen->rounded * length && length >= SHORTEST && length <= screen->longest)) whole = 1;
        }
        for (int64_t r = 0; r < rows; r++) room.lowest[r] = -INFINITY, room.counts[r] = 0;
        wait_for_all(barrier, threads);
        const int64_t chunks = (screen->product.outputs + CHUNK - 1) / CHUNK, end = chunks * (thread + 1) / threads;
        int64_t barred = 0;
        for (int64_t chunk = chunks * thread / threads; chunk < end && !whole; chunk++) {
            const int64_t first = chunk * CHUNK, left = screen->product.outputs - first, size = left < CHUNK ? left : CHUNK;
            Product part = screen->product;
            part.weight = (const int8_t *)screen->product.weight + first * inputs;
            part.scale = screen->product.scale + first;
            part.outputs = size;
            multiply(&part, rows, room.codes, room.scales, room.logits, NULL, 0, 0, 1);
            while (barred < head->barred_count && head->barred[barred] < first) barred++;
            for (; barred < head->barred_count && head->barred[barred] < first + size; barred++)
                for (int64_t r = 0; r < rows; r++) room.logits[r * size + head->barred[barred] - first] = -INFINITY;
            for (int64_t r = 0; r < rows; r++)
                if (!keep(room.logits + r * size, screen->errors + first, size, first, room.lengths[r], &room, r)) whole = 1;
        }
        wait_for_all(barrier, threads);
        for (int64_t r = thread; r < rows && !whole; r += threads)
            if (!judge(screen, choice, r, threads)) whole = 1;
    }
    if (whole) recycle_ds_choose(head, choice);
}
