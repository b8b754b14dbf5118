/* A stack of transformer blocks over the tokens of one step, in one call: norms, products, rotary embedding, cache and
   attention. The Python side is stack.py; structures must have the same fields there. */
#pragma once

#include <omp.h>
#include <string.h>

#include "attention.h"
#include "exchange.h"
#include "joint.h"
#include "products.h"

typedef struct {
    const float *attention_norm, *mlp_norm;
    const float *query_norm, *key_norm; /* or NULL */
    Product query_key_value, output, gate_up, down;
    int64_t rotated;
} Layer;

typedef struct {
    const Layer *layers;
    uint16_t *cache;           /* [layers][blocks][block] */
    const float *cosine, *sine; /* [positions][C / 2] */
    const float *final_norm;   /* or NULL */
    const float *const *piece_norms;
    Exchange *exchange; /* of tensor ranks, which have heads and ffn of their own; NULL: a single one */
    Product joined;     /* of the normalised pieces, to the width D; of several ranks, to a rank's share of the columns */
    int64_t count;      /* layers */
    int64_t pieces;     /* inputs [T, D] that are joined; 0: one input, which enters the first layer unchanged */
    int64_t layer_size; /* elements of the cache of one layer */
    int64_t width, heads, kv_heads, channels, ffn;
    double epsilon;
    const Joint *joint; /* of tapped states, whose outputs are kept with the states; or NULL */
    const uint16_t *const *joined_states; /* its inputs, each bf16 [T, D]: where `tapped` goes */
} Stack;

/* What the cache holds of its slots besides keys and values: the tokens, and for the recycle module states. A stack without
   pieces reads embeddings from it and keeps its states there; one of pieces reads there the states of the slots before those of
   its tokens, and the embeddings of these. */
typedef struct {
    const uint16_t *embedding; /* bf16 [V, D] */
    const int64_t *ids;        /* of each slot's token */
    uint16_t *states;          /* bf16 [slots, columns], or NULL: none are kept */
    int64_t columns;           /* D, or D and the outputs of the joint: what tapped states add to the module's input */
} Contents;

typedef struct {
    int64_t tokens, longest, threads;
    int64_t shift;  /* added to a position for the rotary embedding */
    int64_t copied; /* most blocks of the cache that a token's attention copies, because of a tree */
    const int32_t *slots, *positions, *lowest, *table; /* of each token; table: where its sequence's blocks begin in `blocks` */
    const int32_t *blocks;
    const int32_t *paths; /* of each token: where its path begins in `moved`, or -1: its slots are its positions; or NULL */
    const int32_t *moved; /* paths: the first position that is in another slot, and the slots from there on */
    const uint16_t *const *inputs; /* bf16 [T, D] each */
    const uint16_t *added;         /* bf16 [T, D], added to the joined inputs, or NULL */
    uint16_t *const *tapped;       /* of each layer: where its states go, bf16 [T, D], or NULL; may be NULL itself */
    uint16_t *states;              /* bf16 [T, D] */
    char *room;                    /* room(...) bytes */
    const Contents *contents;      /* in place of `inputs` and `added`, or NULL */
} Step;

typedef struct {
    float *x, *wide, *scales;
    uint16_t *codes, *queries;
    char *own; /* of the first thread */
    int64_t own_size, row, stride;
} Room;

static int64_t divide(const Stack *stack, const Step *step, Room *room) {
    const int64_t t = step->tokens, query = stack->heads * stack->channels;
    const int64_t mixed = query + 2 * stack->kv_heads * stack->channels;
    const Joint *joint = stack->joint;
    const int64_t joined = joint ? joint->width * joint->pieces : 0, outputs = joint ? joint->product.outputs : 0;
    char *at = step->room;
    room->row = largest(largest(largest(stack->width * largest(stack->pieces, 1), stack->ffn), mixed), joined);
    room->stride = (step->longest + BLOCK) / BLOCK * BLOCK + BLOCK;
    room->x = (float *)take(&at, t * stack->width * 4);
    room->wide = (float *)take(&at, t * largest(largest(mixed, stack->ffn), outputs) * 4);
    room->scales = (float *)take(&at, t * 4);
    room->codes = (uint16_t *)take(&at, t * room->row * 2);
    room->queries = (uint16_t *)take(&at, t * query * 2);
    room->own = at;
    take(&at, room->row * 4);
    take(&at, room->stride * MOST_GROUPS * 4);
    take(&at, room->stride * MOST_GROUPS * 2);
    take(&at, step->copied * 2 * BLOCK * stack->channels * 2);
    room->own_size = at - room->own;
    return room->own + room->own_size * step->threads - step->room;
}

/* Bytes that a step needs in `room`. */
int64_t recycle_ds_room(const Stack *stack, const Step *step) {
    Room room;
    return divide(stack, step, &room);
}

INLINE void rotate(float *x, const float *cosine, const float *sine, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float left = x[i], right = x[i + half];
        x[i] = left * cosine[i] - right * sine[i];
        x[i + half] = right * cosine[i] + left * sine[i];
    }
}

/* One head of a token: its norm, if there is one, and its rotation. x: fp32 [C] */
INLINE void turn(const Stack *stack, const Layer *layer, const float *norm, int64_t position, float *x) {
    const int64_t half = stack->channels / 2;
    if (norm) rms_norm(x, norm, stack->channels, (float)stack->epsilon, x);
    if (layer->rotated) rotate(x, stack->cosine + position * half, stack->sine + position * half, half);
}

INLINE void look(const Step *step, int64_t t, View *view) {
    view->blocks = step->blocks + step->table[t];
    view->lowest = step->lowest[t], view->at = step->positions[t], view->slot = step->slots[t];
    view->moved = INT64_MAX;
    if (!step->paths || step->paths[t] < 0) return;
    const int32_t *path = step->moved + step->paths[t];
    view->moved = path[0], view->path = path + 1;
}

/* The place in the cache of a slot of token t's sequence. */
INLINE int64_t place_in_cache(const Step *step, int64_t t, int64_t slot) {
    return (int64_t)step->blocks[step->table[t] + slot / BLOCK] * BLOCK + slot % BLOCK;
}

/* The embedding of token t, by the contents of the cache. */
INLINE const uint16_t *embedding_of(const Step *step, int64_t t, int64_t width) {
    return step->contents->embedding + step->contents->ids[place_in_cache(step, t, step->slots[t])] * width;
}

/* What the contents keep of a slot. */
INLINE uint16_t *kept_of(const Step *step, int64_t t, int64_t slot) {
    return step->contents->states + place_in_cache(step, t, slot) * step->contents->columns;
}

/* The states += the product of encoded rows x, summed over the ranks. Afterwards a thread may read the rows of its tokens. */
static void add_product(
    const Product *product, int64_t tokens, const uint16_t *x, const Room *room, Ranks *ranks, int thread, int threads,
    Barrier *barrier) {
    if (!ranks->exchange) {
        multiply(product, tokens, x, room->scales, room->x, NULL, 1, thread, threads);
        BARRIER
        return;
    }
    multiply(product, tokens, x, room->scales, begin(ranks), NULL, 0, thread, threads);
    meet(ranks, thread, threads, barrier);
    EACH_TOKEN add_places(ranks, t * product->outputs, product->outputs, room->x + t * product->outputs);
}

static void run_layer(
    const Stack *stack, const Step *step, const Room *room, int64_t index, Ranks *ranks, int thread, int threads,
    Barrier *barrier) {
    const Layer *layer = stack->layers + index;
    const int64_t tokens = step->tokens, width = stack->width, query = stack->heads * stack->channels;
    const int64_t mixed = query + 2 * stack->kv_heads * stack->channels, groups = stack->heads / stack->kv_heads;
    const int64_t entries = 2 * stack->kv_heads; /* keys and values of a token */
    /* What is rounded to bf16 leaves its thread so; integers need the scale of a whole row. */
    const int encodes = !layer->output.limit && !layer->down.limit;
    char *own = room->own + thread * room->own_size;
    float *row = (float *)take(&own, room->row * 4);
    float *scores = (float *)take(&own, room->stride * MOST_GROUPS * 4);
    uint16_t *probabilities = (uint16_t *)take(&own, room->stride * MOST_GROUPS * 2);
    View view = {0};
    view.cache = stack->cache + index * stack->layer_size;
    view.kv_heads = stack->kv_heads, view.channels = stack->channels, view.copies = (uint16_t *)own;
#define MULTIPLY(product, y) multiply(product, tokens, room->codes, room->scales, y, NULL, 0, thread, threads)
#define ATTEND(head, token) { \
        const int64_t h = head, t = token, at = t * query + h * groups * stack->channels; \
        look(step, t, &view); \
        attend(&view, h, groups, room->queries + at, room->wide + at, encodes ? room->codes + at : NULL, scores, \
               probabilities, room->stride); \
    }

    EACH_TOKEN {
        rms_norm(room->x + t * width, layer->attention_norm, width, (float)stack->epsilon, row);
        encode(row, width, layer->query_key_value.limit, room->codes + t * width, room->scales + t);
    }
    BARRIER
    MULTIPLY(&layer->query_key_value, room->wide);
    BARRIER
    EACH_TOKEN {
        float *queries = room->wide + t * mixed;
        for (int64_t head = 0; head < stack->heads; head++)
            turn(stack, layer, layer->query_norm, step->positions[t] + step->shift, queries + head * stack->channels);
        narrow(queries, query, room->queries + t * query);
    }
    /* Head by head: tokens of one sequence lie in the same cache lines, which must not travel between the cores. */
    for (int64_t i = entries * tokens * thread / threads; i < entries * tokens * (thread + 1) / threads; i++) {
        const int64_t entry = i / tokens, t = i % tokens;
        float *x = room->wide + t * mixed + query + entry * stack->channels;
        look(step, t, &view);
        if (entry < stack->kv_heads) {
            turn(stack, layer, layer->key_norm, step->positions[t] + step->shift, x);
            store_key(&view, entry, x);
        } else {
            store_value(&view, entry - stack->kv_heads, x);
        }
    }
    BARRIER
    /* As many whole heads for each thread as there are, so that it reads their entries once; then tokens in turn. */
    const int64_t own_heads = stack->kv_heads / threads, left = own_heads * threads;
    for (int64_t i = 0; i < own_heads * tokens; i++) ATTEND(thread * own_heads + i / tokens, i % tokens)
    for (int64_t i = thread; i < (stack->kv_heads - left) * tokens; i += threads) ATTEND(left + i / tokens, i % tokens)
    BARRIER
    if (!encodes) {
        EACH_TOKEN encode(room->wide + t * query, query, layer->output.limit, room->codes + t * query, room->scales + t);
        BARRIER
    }
    add_product(&layer->output, tokens, room->codes, room, ranks, thread, threads, barrier);
    EACH_TOKEN {
        rms_norm(room->x + t * width, layer->mlp_norm, width, (float)stack->epsilon, row);
        encode(row, width, layer->gate_up.limit, room->codes + t * width, room->scales + t);
    }
    BARRIER
    uint16_t *gated = (uint16_t *)room->wide; /* the product still reads room->codes */
    multiply(&layer->gate_up, tokens, room->codes, room->scales, room->wide, encodes ? gated : NULL, 0, thread, threads);
    BARRIER
    if (!encodes) {
        EACH_TOKEN encode(
            room->wide + t * stack->ffn, stack->ffn, layer->down.limit, room->codes + t * stack->ffn, room->scales + t);
        BARRIER
    }
    add_product(&layer->down, tokens, encodes ? gated : room->codes, room, ranks, thread, threads, barrier);
}

/* Runs all layers. The states leave through the final norm, if there is one. Returns -1, or the tensor rank that has not
   answered in time. */
int64_t recycle_ds_run(const Stack *stack, const Step *step) {
    Room room;
    divide(stack, step, &room);
    const int64_t tokens = step->tokens, width = stack->width, joined = width * stack->pieces;
    const Contents *contents = step->contents;
    const int keeps = contents && contents->states && !stack->pieces;
    Barrier all = {0}, *barrier = &all;
    _Atomic int64_t late = -1;
    const int64_t done = stack->exchange ? stack->exchange->done : 0;
#pragma omp parallel num_threads((int)step->threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        Ranks own = {stack->exchange, done, &late}, *ranks = &own;
        float *row = (float *)(room.own + thread * room.own_size);
        if (stack->pieces) {
            EACH_TOKEN {
                if (contents) {
                    const uint16_t *pieces[2] = {kept_of(step, t, step->slots[t] - 1), embedding_of(step, t, width)};
                    normalise(pieces, stack->piece_norms, 2, 0, width, (float)stack->epsilon, row);
                } else {
                    normalise(step->inputs, stack->piece_norms, stack->pieces, t, width, (float)stack->epsilon, row);
                }
                encode(row, joined, stack->joined.limit, room.codes + t * joined, room.scales + t);
            }
            const int64_t columns = stack->joined.outputs; /* of this rank */
            float *y = ranks->exchange ? begin(ranks) : room.x;
            const int adds = contents ? contents->columns > width : step->added != 0;
            if (adds) EACH_TOKEN {
                const uint16_t *added = contents ? kept_of(step, t, step->slots[t] - 1) + width : step->added + t * columns;
                widen(added, columns, y + t * columns);
            }
            BARRIER
            multiply(&stack->joined, tokens, room.codes, room.scales, y, NULL, adds, thread, threads);
            if (ranks->exchange) {
                meet(ranks, thread, threads, barrier);
                EACH_TOKEN for (int64_t rank = 0; rank < ranks->exchange->size; rank++)
                    memcpy(room.x + t * width + rank * columns, place_of(ranks, rank) + t * columns, columns * 4);
            }
        } else {
            EACH_TOKEN widen(
                contents ? embedding_of(step, t, width) : step->inputs[0] + t * width, width, room.x + t * width);
        }
        BARRIER
        for (int64_t i = 0; i < stack->count; i++) {
            run_layer(stack, step, &room, i, ranks, thread, threads, barrier);
            if (step->tapped && step->tapped[i]) EACH_TOKEN narrow(room.x + t * width, width, step->tapped[i] + t * width);
        }
        EACH_TOKEN {
            float *x = room.x + t * width;
            if (stack->final_norm) rms_norm(x, stack->final_norm, width, (float)stack->epsilon, x);
            narrow(x, width, step->states + t * width);
            if (keeps) memcpy(kept_of(step, t, step->slots[t]), step->states + t * width, width * 2);
        }
        if (keeps && stack->joint) {
            const int64_t outputs = stack->joint->product.outputs;
            join_states(
                stack->joint, tokens, stack->joined_states, row, room.codes, room.scales, room.wide, thread, threads, barrier);
            EACH_TOKEN narrow(room.wide + t * outputs, outputs, kept_of(step, t, step->slots[t]) + width);
        }
        if (thread == 0 && stack->exchange) stack->exchange->done = own.done;
    }
    return late;
}
