/* Parameter selection and resampling of a run of elements, as docs/draws.md says.
 *
 * The run is merged in blocks. For each block, all that the draws decide is computed for all of its elements at once, in
 * loops without branches that a compiler turns into vector instructions; one pass per sub-model then copies bits with a
 * mask. A branch or a conditional load per element would cost ten times as much, mispredicted. Everything needed besides
 * the inputs and the output lies on the stack, 40 KiB.
 *
 * Draws, targets and sums of slots are kept minus 2^15, so that int16_t holds them and signed comparison orders them.
 *
 * The file includes itself once per width of an element; what depends on the width stands in its second half.
 */
#ifndef ELEMENT

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef _MSC_VER
#define EXPORT __declspec(dllexport)
#define INLINE static __forceinline
#define RESTRICT __restrict
#else
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define RESTRICT __restrict__
#endif

/* For which processors the loops are compiled; which one runs is decided when the library is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(ONE_TARGET) && (defined(__clang__) || __GNUC__ >= 12)
#ifdef __clang__
#define FOR_EACH_PROCESSOR __attribute__((target_clones("default", "avx2", "avx512bw")))
#else
#define FOR_EACH_PROCESSOR __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif
#else
#define FOR_EACH_PROCESSOR
#endif

enum {
    BLOCK = 256,            /* elements; larger blocks fall out of the first-level cache */
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

/* What decides the bits: plan.py's Selection. Arrays have an entry per sub-model unless said otherwise. */
typedef struct {
    const tensor *sub_models;
    const tensor *base;         /* one, or NULL: selection */
    const int64_t *shape;       /* of all tensors, one entry per axis */
    const uint16_t *slots;      /* each at least 1; at most 65,535 in all */
    const uint16_t *thresholds; /* one fewer */
    const uint64_t *keys;       /* one per round, the first draw's included */
    uint64_t origin;            /* number of the tensors' first element in the stream of draws */
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
    int16_t reach[BLOCK];
    uint16_t total[BLOCK];                                 /* slots of the alternatives */
    uint16_t alternatives[MOST_SUB_MODELS / BITS][BLOCK]; /* a bit per sub-model */
} scratch;

/* Section 2 and 3: the draws of n elements from d on, each minus 2^15. */
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

/* Make all sub-models alternatives, or none where those that differ from the base are yet to be found. */
INLINE void begin(const selection *s, scratch *block)
{
    const int all = s->rounds >= 0;
    unsigned total = 0;
    for (int64_t k = 0; all && k < s->count; k++)
        total += s->slots[k];
    for (size_t i = 0; i < BLOCK; i++)
        block->total[i] = (uint16_t)total;
    for (int64_t k = 0; k < s->count; k += BITS)
        memset(block->alternatives[k / BITS], all ? 0xFF : 0, sizeof block->alternatives[k / BITS]);
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

/* Write elements `start` to `stop` of a merge to `out`. Return 0; -1 where no element has that many bytes. */
EXPORT int mergekit_select_merge(const selection *s, int64_t width, uint64_t start, uint64_t stop, void *out);
EXPORT int mergekit_select_merge(const selection *s, int64_t width, uint64_t start, uint64_t stop, void *out)
{
    switch (width) {
    case 1: merge_8(s, start, stop, out); return 0;
    case 2: merge_16(s, start, stop, out); return 0;
    case 4: merge_32(s, start, stop, out); return 0;
    case 8: merge_64(s, start, stop, out); return 0;
    default: return -1;
    }
}

#ifdef DIGEST
/* SHA-256 of this file as it was compiled. */
EXPORT extern const char mergekit_select_source[];
const char mergekit_select_source[] = DIGEST;
#endif

#else /* once per width */

/* Return where n elements from d on lie one after the other: in place, or copied row by row to `copy`. */
static const ELEMENT *OF_WIDTH(fetch)(const selection *s, const tensor *t, uint64_t d, size_t n, ELEMENT *copy)
{
    if (t->strides == NULL)
        return (const ELEMENT *)(const void *)t->data + d;
    const int64_t last = s->axes - 1, stride = t->strides[last];
    ELEMENT *to = copy;
    while (n > 0) {
        const char *from = t->data;
        uint64_t rest = d;
        for (int64_t axis = last; axis >= 0; axis--) {
            from += (int64_t)(rest % (uint64_t)s->shape[axis]) * t->strides[axis];
            rest /= (uint64_t)s->shape[axis];
        }
        const uint64_t row = (uint64_t)s->shape[last] - d % (uint64_t)s->shape[last];
        const size_t run = row < n ? (size_t)row : n;
        if (stride == (int64_t)sizeof(ELEMENT))
            memcpy(to, from, run * sizeof(ELEMENT));
        else
            for (size_t i = 0; i < run; i++)
                memcpy(to + i, from + (int64_t)i * stride, sizeof(ELEMENT));
        to += run;
        d += run;
        n -= run;
    }
    return copy;
}

/* Copy x where the draw falls before sub-model's end; in descending order, the earliest has the final word. */
INLINE void OF_WIDTH(take)(ELEMENT *RESTRICT out, const ELEMENT *x, const int16_t *draws, int16_t end, size_t n)
{
    for (size_t i = 0; i < n; i++)
        out[i] ^= (out[i] ^ x[i]) & (ELEMENT) - (ELEMENT)(draws[i] < end);
}

/* Make a sub-model an alternative where it differs from the base. */
INLINE void OF_WIDTH(note)(scratch *RESTRICT block, uint16_t *RESTRICT alternatives, const ELEMENT *x,
                           const ELEMENT *base, uint16_t bit, uint16_t slots, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const uint16_t differs = (uint16_t) - (uint16_t)(x[i] != base[i]);
        alternatives[i] |= bit & differs;
        block->total[i] = (uint16_t)(block->total[i] + (slots & differs));
    }
}

/* Set targets where `out` still equals the base, and return how many these are. */
INLINE size_t OF_WIDTH(aim)(scratch *RESTRICT block, const int16_t *draws, const ELEMENT *out, const ELEMENT *base,
                            size_t n)
{
    size_t open = 0;
    for (size_t i = 0; i < n; i++) {
        const uint16_t equal = (uint16_t) - (uint16_t)(out[i] == base[i]);
        const uint16_t u = (uint16_t)(draws[i] ^ HALF);
        const uint16_t target = (uint16_t)((((uint32_t)u * block->total[i]) >> BITS) ^ HALF);
        block->target[i] = (int16_t)((target & equal) | (NEVER & ~equal));
        block->reach[i] = -HALF;
        open += equal & 1;
    }
    return open;
}

/* Copy x where the slots of the alternatives up to this sub-model are the first to exceed the target. */
INLINE void OF_WIDTH(choose)(ELEMENT *RESTRICT out, const ELEMENT *x, scratch *RESTRICT block,
                             uint16_t *RESTRICT alternatives, uint16_t bit, uint16_t slots, int cross_off, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const uint16_t counts = (uint16_t) - (uint16_t)((alternatives[i] & bit) != 0);
        const int16_t before = block->reach[i], reach = (int16_t)(before + (slots & counts));
        const int16_t chosen = (int16_t) - ((before <= block->target[i]) & (reach > block->target[i]));
        block->reach[i] = reach;
        out[i] ^= (out[i] ^ x[i]) & (ELEMENT)chosen; /* all bits, or none */
        if (cross_off) { /* it can be chosen only once */
            alternatives[i] &= (uint16_t) ~(chosen & bit);
            block->total[i] = (uint16_t)(block->total[i] - (chosen & slots));
        }
    }
}

/* Section 5, selection. */
INLINE void OF_WIDTH(select)(const selection *s, scratch *block, uint64_t d, size_t n, ELEMENT *out)
{
    ELEMENT copy[BLOCK];
    const int16_t *draws = draw(block, s->keys[0], s->origin + d, n);
    memcpy(out, OF_WIDTH(fetch)(s, &s->sub_models[s->count - 1], d, n, copy), n * sizeof(ELEMENT));
    for (int64_t k = s->count - 2; k >= 0; k--) {
        const ELEMENT *x = OF_WIDTH(fetch)(s, &s->sub_models[k], d, n, copy);
        OF_WIDTH(take)(out, x, draws, (int16_t)(s->thresholds[k] - HALF), n);
    }
}

/* Section 5, resampling. The base's elements are there first, and each round replaces those that are still there. */
INLINE void OF_WIDTH(resample)(const selection *s, scratch *block, uint64_t d, size_t n, ELEMENT *out)
{
    ELEMENT copy[BLOCK], base_copy[BLOCK];
    const ELEMENT *base = OF_WIDTH(fetch)(s, s->base, d, n, base_copy);
    memcpy(out, base, n * sizeof(ELEMENT));
    begin(s, block);
    for (int64_t k = 0; s->rounds < 0 && k < s->count; k++) {
        const ELEMENT *x = OF_WIDTH(fetch)(s, &s->sub_models[k], d, n, copy);
        OF_WIDTH(note)(block, block->alternatives[k / BITS], x, base, (uint16_t)(1 << k % BITS), s->slots[k], n);
    }
    for (int64_t round = 0; round == 0 || round <= s->rounds; round++) {
        const int16_t *draws = draw(block, s->keys[round], s->origin + d, n);
        if (OF_WIDTH(aim)(block, draws, out, base, n) == 0)
            return;
        for (int64_t k = 0; k < s->count; k++) {
            const ELEMENT *x = OF_WIDTH(fetch)(s, &s->sub_models[k], d, n, copy);
            uint16_t *alternatives = block->alternatives[k / BITS], bit = (uint16_t)(1 << k % BITS);
            if (round < s->rounds)
                OF_WIDTH(choose)(out, x, block, alternatives, bit, s->slots[k], 1, n);
            else
                OF_WIDTH(choose)(out, x, block, alternatives, bit, s->slots[k], 0, n);
        }
    }
}

FOR_EACH_PROCESSOR
static void OF_WIDTH(merge)(const selection *s, uint64_t start, uint64_t stop, ELEMENT *out)
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
