/* Trees of drafts, grown in one call: an output head chooses the children of the nodes of a beam, the likeliest of them are
   the next beam, and the recycle module makes their states. What is found does not depend on the other trees of a call. The
   Python side is growing.py, and speculation/tree.py has the same rules for any device. */
#pragma once

#include <math.h>
#include <string.h>

#include "heads.h"
#include "stack.h"

/* What all trees of a model share. */
typedef struct {
    const Stack *stack; /* the module's: its inputs are a state and an embedding */
    const Head *head;   /* of drafts */
    const uint16_t *embedding;  /* bf16 [V, D] */
    const float *confidence;    /* of the module's confidence layer, [D], or NULL */
    double bias;                /* of that layer */
    int64_t branch;             /* most children of a node, at most the outputs that the head may choose */
} Grower;

/* One tree. Children of the root are at depth 1; node k's numbers are at k - 1. */
typedef struct {
    int64_t index;  /* position and slot of the latest known token, the root */
    int64_t limit;  /* depth at which it ends, at least 1 */
    int64_t width;  /* most nodes of a beam */
    double floor;   /* it ends where the chances of the beam sum to less */
    int64_t layered; /* whether confidences are those of the layer, if there is one */
    float factor;   /* what logits are multiplied by */
    int64_t table;  /* where the sequence's blocks begin in the step's */
    const int64_t *keys; /* of the random numbers at each depth, [limit], or NULL */
    const int64_t *ends; /* tokens after which nothing follows */
    int64_t end_count;
    int64_t depth, count; /* found: depth and nodes */
    int64_t *ids, *parents;       /* found: room for branch x (1 + (limit - 1) x width) each */
    double *confidences, *chances;
    int64_t *expanded;   /* nodes that were in a beam, in the order of their slots after the root */
    int64_t *number;     /* of each node its number there, from 1 on, or 0 */
    int64_t beam, first; /* nodes of the beam, the last of `expanded` or at first the root; their first row */
} Growing;

INLINE int ends_text(const Growing *tree, int64_t id) {
    for (int64_t i = 0; i < tree->end_count; i++)
        if (tree->ends[i] == id) return 1;
    return 0;
}

/* The confidence layer's probability for a state. */
static double layer_of(const Grower *grower, const uint16_t *state) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < grower->stack->width; i += 16)
        total = _mm512_fmadd_ps(from_bf16(state + i), _mm512_loadu_ps(grower->confidence + i), total);
    return 1.0 / (1.0 + exp(-(_mm512_reduce_add_ps(total) + grower->bias)));
}

/* Adds the children of a node: `ids` with log probabilities, descending. layer: the first one's confidence, the others share
   the rest; negative: confidences are the probabilities. */
static void add_children(
    Growing *tree, int64_t node, int64_t count, const int64_t *ids, const float *log_probabilities, double layer) {
    const double reached = node ? tree->chances[node - 1] : 1.0, highest = exp(log_probabilities[0]), rest = 1.0 - highest;
    for (int64_t i = 0; i < count; i++) {
        const double probability = exp(log_probabilities[i]);
        if (!(probability > 0)) return; /* a vocabulary with fewer tokens */
        double confidence = probability;
        if (layer >= 0) {
            const double share = rest > 0 ? (1.0 - layer) * probability / rest : 0.0;
            confidence = i == 0 ? layer : share < 1.0 ? share : 1.0;
        }
        const int64_t k = tree->count++;
        tree->ids[k] = ids[i], tree->parents[k] = node, tree->number[k] = 0;
        tree->confidences[k] = confidence, tree->chances[k] = reached * confidence;
    }
}

/* Chooses the next beam among the nodes from `first` on (counted from 0): the highest chances, of equal ones the earlier node.
   expanded: nodes in beams before. */
static void choose_beam(Growing *tree, int64_t first, int64_t expanded) {
    double sum = 0;
    tree->beam = 0;
    if (tree->depth >= tree->limit) return;
    for (int64_t i = 0; i < tree->width; i++) {
        int64_t best = -1;
        for (int64_t k = first; k < tree->count; k++)
            if (!tree->number[k] && !ends_text(tree, tree->ids[k]) && (best < 0 || tree->chances[k] > tree->chances[best]))
                best = k;
        if (best < 0) break;
        tree->expanded[expanded + i] = best + 1, tree->number[best] = expanded + i + 1;
        sum += tree->chances[best], tree->beam++;
    }
    if (!(sum >= tree->floor)) tree->beam = 0;
}

/* Writes where a node of a beam at the tree's depth is, and what it sees. moved: where its path begins. Returns the numbers
   that the path takes. */
static int64_t describe_node(const Growing *tree, int64_t node, int64_t t, int64_t moved, Step *step) {
    const int64_t depth = tree->depth, slot = tree->index + tree->number[node - 1], position = tree->index + depth;
    int32_t *slots = (int32_t *)step->slots, *positions = (int32_t *)step->positions, *path = (int32_t *)step->moved + moved;
    ((int32_t *)step->lowest)[t] = 1, ((int32_t *)step->table)[t] = (int32_t)tree->table;
    slots[t] = (int32_t)slot, positions[t] = (int32_t)position;
    if (slot + 1 > step->longest) step->longest = slot + 1;
    int64_t own = position + 1; /* the first position from which on all lie in other slots */
    for (int64_t at = position, k = node; k; k = tree->parents[k - 1], at--) {
        path[1 + at - tree->index - 1] = (int32_t)(tree->index + tree->number[k - 1]);
        if (tree->index + tree->number[k - 1] != at) own = at;
    }
    int32_t *paths = (int32_t *)step->paths;
    if (own > position) {
        paths[t] = -1;
        return 0;
    }
    paths[t] = (int32_t)moved;
    const int64_t skipped = own - tree->index - 1, blocks = position / BLOCK - own / BLOCK + 1;
    for (int64_t i = 1 + skipped; i <= depth; i++) path[i - skipped] = path[i];
    path[0] = (int32_t)own;
    if (blocks > step->copied) step->copied = blocks;
    return 1 + depth - skipped;
}

/* Grows the trees. choice: with room for the rows of all beams and arrays of that size, which are written; its x is at first
   the states of the roots. step: likewise; its inputs are two arrays [rows, D] that are written. For a single tensor rank. */
void recycle_ds_grow(const Grower *grower, Growing *trees, int64_t count, Choice *choice, Step *step) {
    const int64_t width = grower->stack->width, found = grower->branch;
    int64_t rows = count;
    for (int64_t i = 0; i < count; i++) {
        Growing *tree = trees + i;
        tree->depth = tree->count = 0, tree->beam = 1, tree->first = i;
        ((float *)choice->factors)[i] = tree->factor;
        ((int64_t *)choice->keys)[i] = tree->keys ? tree->keys[0] : 0;
    }
    while (rows) {
        choice->rows = rows;
        recycle_ds_choose(grower->head, choice);
        int64_t next = 0, moved = 0;
        step->longest = step->copied = 0;
        for (int64_t i = 0; i < count; i++) {
            Growing *tree = trees + i;
            if (!tree->beam) continue;
            const int64_t before = tree->count, beam = tree->beam, row = tree->first;
            int64_t expanded = 0; /* nodes in beams so far */
            for (int64_t k = 0; k < before; k++) expanded += tree->number[k] > 0;
            for (int64_t j = 0; j < beam; j++) {
                const int64_t r = row + j, node = tree->depth ? tree->expanded[expanded - beam + j] : 0;
                const double layer = grower->confidence && tree->layered ? layer_of(grower, choice->x + r * width) : -1.0;
                add_children(tree, node, found, choice->ids + r * found, choice->log_probabilities + r * found, layer);
            }
            tree->depth++;
            choose_beam(tree, before, expanded);
            tree->first = next;
            for (int64_t j = 0; j < tree->beam; j++, next++) {
                const int64_t node = tree->expanded[expanded + j], parent = tree->parents[node - 1];
                const int64_t from = parent ? row + tree->number[parent - 1] - 1 - (expanded - beam) : row;
                memcpy((uint16_t *)step->inputs[0] + next * width, choice->x + from * width, width * 2);
                memcpy((uint16_t *)step->inputs[1] + next * width, grower->embedding + tree->ids[node - 1] * width, width * 2);
                moved += describe_node(tree, node, next, moved, step);
            }
        }
        rows = next;
        if (!rows) break;
        int64_t row = 0;
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < trees[i].beam; j++, row++) {
                ((float *)choice->factors)[row] = trees[i].factor;
                ((int64_t *)choice->keys)[row] = trees[i].keys ? trees[i].keys[trees[i].depth] : 0;
            }
        step->tokens = rows;
        recycle_ds_run(grower->stack, step);
        choice->x = step->states;
    }
}
