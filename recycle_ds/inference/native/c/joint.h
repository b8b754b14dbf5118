/* Several states of a token, each with its norm, joined by one product: W [norm_1(a); norm_2(b); ...]. The Python side is
   joining.py. */
#pragma once

#include <omp.h>

#include "exchange.h"
#include "products.h"

typedef struct {
    Product product;
    const float *const *norms;
    int64_t pieces, width;
    double epsilon;
} Joint;

#define BARRIER wait_for_all(barrier, threads);
#define EACH_TOKEN for (int64_t t = thread; t < tokens; t += threads)

/* The pieces of a token, each with its norm, one after the other. row: fp32 [pieces D] */
static void normalise(
    const uint16_t *const *inputs, const float *const *norms, int64_t pieces, int64_t token, int64_t width, float epsilon,
    float *row) {
    for (int64_t i = 0; i < pieces; i++) {
        float *piece = row + i * width;
        widen(inputs[i] + token * width, width, piece);
        if (norms[i]) rms_norm(piece, norms[i], width, epsilon, piece);
    }
}

/* What tapped states add to the recycle module's input: fp32 `sums` [T, outputs]. inputs: bf16 [T, D] each. row:
   fp32 [pieces D], of this thread. codes [T, pieces D], scales [T]: of all threads. Afterwards a thread may read all rows. */
static void join_states(
    const Joint *joint, int64_t tokens, const uint16_t *const *inputs, float *row, uint16_t *codes,
    float *scales, float *sums, int thread, int threads, Barrier *barrier) {
    const int64_t joined = joint->width * joint->pieces, outputs = joint->product.outputs;
    EACH_TOKEN {
        normalise(inputs, joint->norms, joint->pieces, t, joint->width, (float)joint->epsilon, row);
        encode(row, joined, joint->product.limit, codes + t * joined, scales + t);
    }
    BARRIER
    multiply(&joint->product, tokens, codes, scales, sums, NULL, 0, thread, threads);
    BARRIER
}

/* The same as one call, as bf16 [T, outputs]. room: (T + threads) x pieces x D x 4 + T x (outputs + 1) x 4 bytes. */
void recycle_ds_join(
    const Joint *joint, int64_t tokens, const uint16_t *const *inputs, uint16_t *y, char *room, int64_t most) {
    const int64_t joined = joint->width * joint->pieces, outputs = joint->product.outputs;
    float *sums = (float *)room, *scales = sums + tokens * outputs, *rows = scales + tokens;
    uint16_t *codes = (uint16_t *)(rows + most * joined);
    Barrier all = {0}, *barrier = &all;
#pragma omp parallel num_threads((int)most)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        join_states(joint, tokens, inputs, rows + thread * joined, codes, scales, sums, thread, threads, barrier);
        EACH_TOKEN narrow(sums + t * outputs, outputs, y + t * outputs);
    }
}
