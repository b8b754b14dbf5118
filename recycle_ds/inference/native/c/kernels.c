/* All kernels, as one file to be compiled: what they export is called from the Python files one folder above. */
#include <omp.h>

#include "choice.h"
#include "grow.h"
#include "heads.h"
#include "products.h"
#include "screen.h"
#include "stack.h"

/* y = x W^T + b, bf16 [rows, inputs] to fp32 [rows, outputs]. room: rows x (inputs x 2 + 4) + most x inputs x 4
   bytes; most: threads. */
void recycle_ds_multiply(
    const Product *product, int64_t rows, const uint16_t *x, float *y, char *room, int64_t most) {
    const int64_t inputs = product->inputs;
    float *scales = (float *)room, *rows_of_threads = scales + rows;
    uint16_t *codes = (uint16_t *)(rows_of_threads + most * inputs);
    Barrier all = {0}, *barrier = &all;
#pragma omp parallel num_threads((int)most)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (int64_t r = thread; r < rows; r += threads) {
            float *row = rows_of_threads + thread * inputs;
            widen(x + r * inputs, inputs, row);
            encode(row, inputs, product->limit, codes + r * inputs, scales + r);
        }
        BARRIER
        multiply(product, rows, codes, scales, y, NULL, 0, thread, threads);
    }
}
