/* Parameter selection and resampling of a run of elements, as docs/draws.md says.
 *
 * The run is merged in blocks. All that the draws decide is computed for all elements of a block at once, in loops without
 * branches that compilers turn into vector instructions: a branch or a conditional load per element would cost ten times
 * as much, mispredicted. Besides inputs and output there is only the stack, at most 50 KiB of it.
 *
 * Draws, targets and reaches are kept minus 2^15, so that int16_t holds them and signed comparison orders them.
 *
 * The file includes itself once per width of an element; its second half is what depends on the width.
 */
#ifndef ELEMENT

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* The processors that the loops are compiled for; the loader of the library chooses. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(ONE_TARGET) && defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("default", "avx2", "avx512bw")))
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(ONE_TARGET) && __GNUC__ >= 12
#define FOR_EACH_PROCESSOR __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FOR_EACH_PROCESSOR
#endif

enum {
    BLOCK = 256,            /* elements; larger blocks fall out of the first-level cache */
    GROUP = 4,              /* sub-models that one pass over a block handles; divides BITS */
    LANES = 4,              /* draws in a word of the generator */
    MOST_SUB_MODELS = 1024,
    BITS = 16,              /* of a draw, and of a word of alternatives */
    HALF = 1 << (BITS - 1), /* what draws, targets and reaches are lowered by */
    NEVER = HALF - 1        /* a target, lowered, that no reach exceeds */
};

typedef struct {
    const char *data;
    const int64_t *strides; /* in bytes, one per axis; NULL where the elements lie one after the other */
} tensor;

/* plan.py's Selection. Arrays have an entry per sub-model unless something else is said. */
typedef struct {
    const tensor *sub_models;
    const tensor *base;         /* one, or NULL: selection */
    const int64_t *shape;       /* one entry per axis */
    const uint16_t *slots;      /* each at least 1; at most 65,535 in all */
    const uint16_t *thresholds; /* one fewer than there are sub-models */
    const uint64_t *keys;       /* one per round, the first draw's included */
    uint64_t origin;            /* the tensors' first element is this one in the stream of draws */
    int64_t count;              /* of sub-models */
    int64_t axes;
    int64_t rounds;             /* the most redraws; -1: until it differs */
} selection;

/* What is known of each element of a block while it is merged. */
typedef struct {
    union {
        uint64_t words[BLOCK / LANES + 1]; /* one more: a run that starts inside a word ends inside another */
        int16_t lanes[BLOCK + LANES];
    } draws;
    int16_t target[BLOCK];
    int16_t reach[BLOCK];                                 /* slots of the alternatives up to the present sub-model */
    uint16_t total[BLOCK];                                /* slots of all alternatives */
    uint16_t alternatives[MOST_SUB_MODELS / BITS][BLOCK]; /* a bit per sub-model */
} scratch;

/* Sections 2 and 3: the draws of n elements from d on. */
INLINE const int16_t *draw(scratch *block, uint64_t key, uint64_t d, size_t n)
{
    const size_t skip = (size_t)(d % LANES), count = (skip + n + LANES - 1) / LANES;
    for (size_t i = 0; i < count; i++) {
        uint64_t z = key + (d / LANES + i + 1) * UINT64_C(0x9E3779B97F4A7C15);
        z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
        z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
        block->draws.words[i] = z ^ (z >> 31);
    }
    return block->draws.lanes + skip;
}

#define JOIN(name, bits) name##_##bits
#define NAMED(name, bits) JOIN(name, bits)
#define OF_WIDTH(name) NAMED(name, WIDTH)

#define WIDTH 8
#define ELEMENT uint8_t
#include "kernel.c"
#define WIDTH 16
#define ELEMENT uint16_t
#include "kernel.c"
#define WIDTH 32
#define ELEMENT uint32_t
#include "kernel.c"
#define WIDTH 64
#define ELEMENT uint64_t
#include "kernel.c"

#ifdef DIGEST
const char mergekit_select_source[] = DIGEST; /* SHA-256 of this file as it was compiled */
#endif

#else /* once per width */

/* Return where n elements from d on lie one after the other: in place, or copied row by row. */
static const ELEMENT *OF_WIDTH(fetch)(const selection *s, const tensor *t, uint64_t d, size_t n, ELEMENT *copy)
{
    if (t->strides == NULL)
        return (const ELEMENT *)(const void *)t->data + d;
    const int64_t last = s->axes - 1, stride = t->strides[last];
    for (size_t done = 0, run; done < n; done += run, d += run) {
        const char *from = t->data;
        uint64_t rest = d;
        for (int64_t axis = last; axis >= 0; axis--) {
            from += (int64_t)(rest % (uint64_t)s->shape[axis]) * t->strides[axis];
            rest /= (uint64_t)s->shape[axis];
        }
        const uint64_t row = (uint64_t)s->shape[last] - d % (uint64_t)s->shape[last];
        run = row < n - done ? (size_t)row : n - done;
        if (stride == (int64_t)sizeof(ELEMENT))
            memcpy(copy + done, from, run * sizeof(ELEMENT));
        else
            for (size_t i = 0; i < run; i++)
                memcpy(copy + done + i, from + (int64_t)i * stride, sizeof(ELEMENT));
    }
    return copy;
}

/* Copy x where the draw falls before its end. In descending order, the earliest sub-model has the final word. */
INLINE void OF_WIDTH(take)(ELEMENT *restrict out, const ELEMENT *x, const int16_t *draws, int16_t end, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const ELEMENT falls = (ELEMENT) - (ELEMENT)(draws[i] < end);
        out[i] = (ELEMENT)((x[i] & falls) | (out[i] & ~falls)); /* gcc makes a branch of out ^ ((out ^ x) & falls) */
    }
}

typedef struct {
    const ELEMENT *x[GROUP];
    uint16_t slots[GROUP]; /* 0 beyond the last sub-model: what has none is never chosen */
} OF_WIDTH(group);

INLINE OF_WIDTH(group) OF_WIDTH(gather)(const selection *s, int64_t first, uint64_t d, size_t n, ELEMENT *copies)
{
    OF_WIDTH(group) group;
    for (int g = 0; g < GROUP; g++) {
        const int64_t k = first + g < s->count ? first + g : s->count - 1;
        group.x[g] = OF_WIDTH(fetch)(s, &s->sub_models[k], d, n, copies + g * BLOCK);
        group.slots[g] = first + g < s->count ? s->slots[k] : 0;
    }
    return group;
}

/* Make each sub-model an alternative where it differs from the base; its bit comes after so many others. */
INLINE void OF_WIDTH(note)(scratch *restrict block, uint16_t *restrict alternatives, int others,
                           OF_WIDTH(group) group, const ELEMENT *base, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint16_t noted = 0, total = block->total[i];
        for (int g = 0; g < GROUP; g++) {
            const uint16_t differs = (uint16_t) - (uint16_t)(group.x[g][i] != base[i]);
            noted |= (1 << g) & differs;
            total = (uint16_t)(total + (group.slots[g] & differs));
        }
        alternatives[i] |= (uint16_t)(noted << others);
        block->total[i] = total;
    }
}

/* Set targets where `out` still equals the base, and return how many these are. */
INLINE size_t OF_WIDTH(aim)(scratch *restrict block, const int16_t *draws, const ELEMENT *out, const ELEMENT *base,
                            size_t n)
{
    size_t open = 0;
    for (size_t i = 0; i < n; i++) {
        const uint16_t equal = (uint16_t) - (uint16_t)(out[i] == base[i]), u = (uint16_t)(draws[i] ^ HALF);
        const uint16_t target = (uint16_t)((((uint32_t)u * block->total[i]) >> BITS) ^ HALF);
        block->target[i] = (int16_t)((target & equal) | (NEVER & ~equal));
        block->reach[i] = -HALF;
        open += equal & 1;
    }
    return open;
}

/* Copy each sub-model where the slots of the alternatives up to it are the first to exceed the target. Whether these are
 * crossed off must be known when this is compiled: a condition in the loop would keep it from vector instructions. */
INLINE void OF_WIDTH(choose)(ELEMENT *restrict out, const OF_WIDTH(group) *group, scratch *restrict block,
                             uint16_t *restrict alternatives, int others, int cross_off, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const int16_t target = block->target[i];
        int16_t reach = block->reach[i];
        uint16_t taken = 0, slots = 0;
        ELEMENT value = out[i];
        for (int g = 0; g < GROUP; g++) {
            const uint16_t counts = (uint16_t) - (uint16_t)(alternatives[i] >> others >> g & 1);
            const int16_t before = reach;
            reach = (int16_t)(before + (group->slots[g] & counts));
            const int16_t chosen = (int16_t) - ((before <= target) & (reach > target));
            value ^= (value ^ group->x[g][i]) & (ELEMENT)chosen; /* all bits, or none */
            taken |= (uint16_t)((1 << g) & chosen);
            slots |= group->slots[g] & (uint16_t)chosen;
        }
        out[i] = value;
        block->reach[i] = reach;
        if (cross_off) { /* it can be chosen only once */
            alternatives[i] &= (uint16_t) ~(taken << others);
            block->total[i] = (uint16_t)(block->total[i] - slots);
        }
    }
}

/* Section 5, selection. */
INLINE void OF_WIDTH(select)(const selection *s, scratch *block, uint64_t d, size_t n, ELEMENT *out)
{
    ELEMENT copy[BLOCK];
    const int16_t *draws = draw(block, s->keys[0], s->origin + d, n);
    memcpy(out, OF_WIDTH(fetch)(s, &s->sub_models[s->count - 1], d, n, copy), n * sizeof(ELEMENT));
    for (int64_t k = s->count - 2; k >= 0; k--)
        OF_WIDTH(take)(out, OF_WIDTH(fetch)(s, &s->sub_models[k], d, n, copy), draws,
                       (int16_t)(s->thresholds[k] - HALF), n);
}

/* Section 5, resampling. The base's elements are there first, and each round replaces those that are still there. */
INLINE void OF_WIDTH(resample)(const selection *s, scratch *block, uint64_t d, size_t n, ELEMENT *out)
{
    ELEMENT copies[GROUP * BLOCK], base_copy[BLOCK];
    const ELEMENT *base = OF_WIDTH(fetch)(s, s->base, d, n, base_copy);
    const int until_it_differs = s->rounds < 0;
    uint16_t total = 0;
    for (int64_t k = 0; k < s->count; k++)
        total = (uint16_t)(total + s->slots[k]);
    for (size_t i = 0; i < n; i++)
        block->total[i] = until_it_differs ? 0 : total;
    memcpy(out, base, n * sizeof(ELEMENT));
    for (int64_t k = 0; k < s->count; k += GROUP) {
        uint16_t *alternatives = block->alternatives[k / BITS];
        if (k % BITS == 0)
            memset(alternatives, until_it_differs ? 0 : 0xFF, n * sizeof *alternatives);
        if (until_it_differs)
            OF_WIDTH(note)(block, alternatives, (int)(k % BITS), OF_WIDTH(gather)(s, k, d, n, copies), base, n);
    }
    for (int64_t round = 0; round == 0 || round <= s->rounds; round++) {
        const int16_t *draws = draw(block, s->keys[round], s->origin + d, n);
        if (OF_WIDTH(aim)(block, draws, out, base, n) == 0)
            return;
        for (int64_t k = 0; k < s->count; k += GROUP) {
            const OF_WIDTH(group) group = OF_WIDTH(gather)(s, k, d, n, copies);
            uint16_t *alternatives = block->alternatives[k / BITS];
            if (round < s->rounds)
                OF_WIDTH(choose)(out, &group, block, alternatives, (int)(k % BITS), 1, n);
            else
                OF_WIDTH(choose)(out, &group, block, alternatives, (int)(k % BITS), 0, n);
        }
    }
}

/* Write elements `start` to `stop` of a merge to `out`. */
FOR_EACH_PROCESSOR
void OF_WIDTH(mergekit_select_merge)(const selection *s, uint64_t start, uint64_t stop, ELEMENT *out)
{
    scratch block;
    for (uint64_t d = start; d < stop; d += BLOCK) {
        const size_t n = stop - d < BLOCK ? (size_t)(stop - d) : BLOCK;
        if (s->base == NULL)
            OF_WIDTH(select)(s, &block, d, n, out + (d - start));
        else
            OF_WIDTH(resample)(s, &block, d, n, out + (d - start));
    }
}

#undef ELEMENT
#undef WIDTH

#endif
