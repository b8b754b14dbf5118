/* Waiting of threads for each other, and sums over the tensor ranks of one host through memory that they share.

   The memory is that of SharedMemoryCollectives (engine/collectives.py), with one order of exchanges for both: a counter of
   each rank, one cache line apart, then two places of each rank, used in turn. A rank writes its place and counts up; it
   reads those of all once all have counted up. Who counts up has read what was exchanged before. */
#pragma once

#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#include "vectors.h"

/* Looks at a counter before the core is offered to others: a thread that waits for one without a core would keep it from
   getting this one. */
enum { SPINS = 2000, LINE = 64 };

/* A barrier that costs a fraction of a microsecond, where OpenMP's makes a system call. */
typedef struct {
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int round;
} Barrier;

static void wait_for_all(Barrier *barrier, int threads) {
    if (threads == 1) return;
    const int round = atomic_load_explicit(&barrier->round, memory_order_acquire);
    if (atomic_fetch_add_explicit(&barrier->arrived, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&barrier->round, round + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&barrier->round, memory_order_acquire) == round; spins++) {
        if (spins < SPINS) _mm_pause();
        else sched_yield();
    }
}

/* Of a rank; the same fields as ExchangeStruct in exchange.py. */
typedef struct {
    char *memory;
    int64_t rank, size;
    int64_t room; /* bytes of a place */
    int64_t done; /* exchanges so far */
    double timeout; /* seconds to wait for a rank */
} Exchange;

/* The exchanges of one thread in a call. `late` is shared by its threads: the rank that did not answer, or -1. */
typedef struct {
    const Exchange *exchange; /* NULL for a single rank */
    int64_t done;
    _Atomic int64_t *late;
} Ranks;

static float *place_of(const Ranks *ranks, int64_t rank) {
    const Exchange *e = ranks->exchange;
    return (float *)(e->memory + LINE * e->size + (ranks->done % 2 * e->size + rank) * e->room);
}

/* Begins an exchange. Returns this rank's place, which its threads fill before they meet. */
static float *begin(Ranks *ranks) {
    ranks->done++;
    return place_of(ranks, ranks->exchange->rank);
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Waits until all threads of all ranks have filled their places. After a rank has not answered in time, nobody waits for it
   again: the call ends with wrong numbers and reports the rank. */
static void meet(Ranks *ranks, int thread, int threads, Barrier *barrier) {
    const Exchange *e = ranks->exchange;
    wait_for_all(barrier, threads);
    if (thread == 0)
        atomic_store_explicit((_Atomic int64_t *)(e->memory + LINE * e->rank), ranks->done, memory_order_release);
    for (int64_t rank = 0; rank < e->size; rank++) {
        const _Atomic int64_t *count = (const _Atomic int64_t *)(e->memory + LINE * rank);
        double last = 0, waited = 0; /* a process that is suspended for a while does not wait meanwhile */
        for (int spins = 0; atomic_load_explicit(count, memory_order_acquire) < ranks->done; spins++) {
            if (spins < SPINS) {
                _mm_pause();
                continue;
            }
            sched_yield();
            if (atomic_load(ranks->late) >= 0) return;
            const double now = seconds();
            if (last) waited += now - last < 2 ? now - last : 2;
            last = now;
            if (waited > e->timeout) atomic_store(ranks->late, rank);
            spins = SPINS;
        }
    }
}

/* x += the sum of the places of all ranks, in their order, so that all ranks get the same bits; numbers `first` to
   `first + count - 1`, multiples of 16. */
INLINE void add_places(const Ranks *ranks, int64_t first, int64_t count, float *x) {
    const int64_t size = ranks->exchange->size;
    const float *one = place_of(ranks, 0) + first;
    const int64_t apart = ranks->exchange->room / (int64_t)sizeof(float);
    for (int64_t i = 0; i < count; i += 16) {
        __m512 sum = _mm512_loadu_ps(one + i);
        for (int64_t rank = 1; rank < size; rank++) sum = _mm512_add_ps(sum, _mm512_loadu_ps(one + rank * apart + i));
        _mm512_storeu_ps(x + i, _mm512_add_ps(_mm512_loadu_ps(x + i), sum));
    }
}
