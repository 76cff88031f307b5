/* Attention over the paged pool: scores of all keys that a query may see, an exact maximum, powers
 * of two, then the weighted sum of values key by key in the order of their positions.
 *
 * What is computed for a query is a function of its sequence alone: later keys that its tile of
 * queries brings along have the weight zero, and adding zero changes no bit. */
#include "products.h"

enum {
    QUERY_ROWS = 24, /* query heads of one key head in a tile, of one or more tokens */
    AHEAD = 2,       /* blocks */
};

#define LOG2_E 1.44269504088896340736

typedef struct {
    int64_t halves, layers, hidden, heads, kv_heads, head_dim, ff, vocab, positions;
    int64_t blocks, block_tokens, block_bytes; /* of the pool: [block][layer][k, v][kv head][token][dim] */
    char *pool;
} Shape;

/* Where a sequence's keys and values of one head are: pointers per block, rows of `stride` bytes of
 * bfloat16 (`halves`) or float32. `key_rows` and `value_rows` are private copies in float32, padded
 * with zeros, for heads that do not fill whole vectors. */
typedef struct {
    const char **keys, **values;
    float *key_rows, *value_rows;
    char *queries;         /* [QUERY_ROWS] rows of `stride` */
    float *found, *scores; /* [QUERY_ROWS, lanes], [QUERY_ROWS, score_stride] */
    size_t stride, lanes, score_stride;
    int halves, in_place;
} Context;

INLINE int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

INLINE float widened(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To the nearest bfloat16, ties to even; NaN stays NaN. */
INLINE uint16_t narrowed(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : nearest);
}

INLINE void widen(const uint16_t *from, float *to, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        to[i] = widened(from[i]);
}

/* `count` floats as the weights' type. */
INLINE void put(int halves, const float *from, char *to, int64_t count)
{
    if (!halves) {
        memcpy(to, from, (size_t)count * 4);
        return;
    }
    uint16_t *half = (uint16_t *)to;
    for (int64_t i = 0; i < count; i++)
        half[i] = narrowed(from[i]);
}

INLINE char *pool_rows(const Shape *s, int64_t block, int64_t layer, int64_t value, int64_t head)
{
    int64_t index = (layer * 2 + value) * s->kv_heads + head;
    int64_t size = s->block_tokens * s->head_dim * (s->halves ? 2 : 4);
    return s->pool + block * s->block_bytes + index * size;
}

/* Rows of the pool as rows of floats that end in zeros. */
static void unpack(const Shape *s, const char *from, float *to, size_t lanes, int64_t rows)
{
    int64_t dim = s->head_dim;
    for (int64_t r = 0; r < rows; r++) {
        if (s->halves)
            widen((const uint16_t *)from + r * dim, to + r * lanes, dim);
        else
            memcpy(to + r * lanes, (const float *)from + r * dim, (size_t)dim * 4);
        for (int64_t i = dim; i < (int64_t)lanes; i++)
            to[r * lanes + i] = 0;
    }
}

/* The first `dim` of a row's `lanes` are the head. */
static void describe_context(const Shape *s, Context *c)
{
    int64_t size = s->halves ? 2 : 4;
    c->lanes = (size_t)round_up(s->head_dim, LANES);
    c->in_place = s->head_dim * size % VECTOR_BYTES == 0;
    c->halves = c->in_place && s->halves;
    c->stride = c->lanes * (c->halves ? 2 : 4);
}

static void find_context(const Shape *s, Context *c, const int64_t *table, int64_t layer,
                         int64_t head, int64_t keys)
{
    int64_t tokens = s->block_tokens;
    for (int64_t b = 0; b * tokens < keys; b++) {
        c->keys[b] = pool_rows(s, table[b], layer, 0, head);
        c->values[b] = pool_rows(s, table[b], layer, 1, head);
        if (!c->in_place) {
            int64_t rows = keys - b * tokens < tokens ? keys - b * tokens : tokens;
            float *key = c->key_rows + b * tokens * c->lanes;
            float *value = c->value_rows + b * tokens * c->lanes;
            unpack(s, c->keys[b], key, c->lanes, rows);
            unpack(s, c->values[b], value, c->lanes, rows);
            c->keys[b] = (const char *)key;
            c->values[b] = (const char *)value;
        }
    }
}

/* Blocks lie anywhere in the pool: what comes after next is asked for early. */
INLINE void ask_for(const char *const *blocks, int64_t block, int64_t count, size_t begin, size_t end)
{
    if (block < count)
        for (size_t at = begin; at < end; at += 64)
            __builtin_prefetch(blocks[block] + at, 0, 3);
}

static void score(const Shape *s, Context *c, int64_t rows, int64_t keys)
{
    int64_t tokens = s->block_tokens, blocks = (keys + tokens - 1) / tokens;
    Part p = {.whole = c->stride, .first = 1, .last = 1};
    for (int64_t b = 0; b < blocks; b++) {
        int64_t count = keys - b * tokens < tokens ? keys - b * tokens : tokens;
        Matrices m = {.x = c->queries, .x_stride = c->stride, .w = c->keys[b],
                      .w_stride = c->stride, .y = c->scores + b * tokens,
                      .y_stride = c->score_stride};
        for (int64_t k = 0; k < count; k += 4) {
            size_t at = (size_t)k * c->stride;
            ask_for(c->keys, b + AHEAD, blocks, at, at + 4 * c->stride);
            if (b + AHEAD >= blocks) /* the values come next */
                ask_for(c->values, b + AHEAD - blocks, blocks, at, at + 4 * c->stride);
            panel(c->halves, &m, &p, count - k < 4 ? (int)(count - k) : 4, rows, SET);
            m.w += 4 * m.w_stride;
            m.y += 4;
        }
    }
}

/* Products of a row to powers of two: `seen` of `keys` count, the others become 0. Returns
 * their sum. */
static float softmax(float *row, float scale, int64_t seen, int64_t keys)
{
    int64_t end = round_up(keys, LANES);
    for (int64_t k = seen; k < end; k++)
        row[k] = -__builtin_inff();
    floats most = load(row);
    for (int64_t k = LANES; k < end; k += LANES)
        most = larger(most, load(row + k));
    float best = most[0];
    for (int i = 1; i < LANES; i++)
        best = most[i] > best ? most[i] : best;
    floats sum = {0};
    for (int64_t k = 0; k < end; k += LANES) {
        floats p = power_of_two((load(row + k) - splat(best)) * splat(scale));
        *(floats *)(row + k) = p;
        sum += p;
    }
    return sum1(sum);
}

/* LANES values as floats. */
INLINE floats value_at(const int halves, const char *from)
{
    if (!halves)
        return load(from);
    uint16_t half __attribute__((vector_size(2 * LANES)));
    memcpy(&half, from, sizeof half);
    return (floats)(__builtin_convertvector(half, ints) << 16);
}

INLINE void weigh(const int halves, const int rows, const int vectors, const Shape *s,
                  const Context *c, int64_t row, size_t lane, int64_t keys)
{
    int64_t tokens = s->block_tokens, blocks = (keys + tokens - 1) / tokens;
    const int size = halves ? 2 : 4;
    floats sum[MOST_ROWS][4];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[r][v] = (floats){0};
    for (int64_t b = 0; b < blocks; b++) {
        int64_t count = keys - b * tokens < tokens ? keys - b * tokens : tokens;
        const char *value = c->values[b] + lane * size;
        const float *weight = c->scores + row * c->score_stride + b * tokens;
        for (int64_t k = 0; k < count; k++, value += c->stride, weight++) {
            floats part[4];
            ask_for(c->values, b + AHEAD, blocks, k * c->stride, (k + 1) * c->stride);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                part[v] = value_at(halves, value + v * LANES * size);
                KEEP(part[v]);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                floats w = splat(weight[r * c->score_stride]);
                KEEP(w);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++)
                    sum[r][v] = fused(w, part[v], sum[r][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            *(floats *)(c->found + (row + r) * c->lanes + lane + v * LANES) = sum[r][v];
}

INLINE void weigh_rows(const int halves, const int vectors, const Shape *s, const Context *c,
                       int64_t rows, size_t lane, int64_t keys)
{
    for (int64_t row = 0; row < rows; row += MOST_ROWS)
        switch (rows - row) {
        case 1: weigh(halves, 1, vectors, s, c, row, lane, keys); break;
        case 2: weigh(halves, 2, vectors, s, c, row, lane, keys); break;
        case 3: weigh(halves, 3, vectors, s, c, row, lane, keys); break;
        case 4: weigh(halves, 4, vectors, s, c, row, lane, keys); break;
        case 5: weigh(halves, 5, vectors, s, c, row, lane, keys); break;
        default: weigh(halves, 6, vectors, s, c, row, lane, keys); break;
        }
}

INLINE void weigh_all(const int halves, const Shape *s, const Context *c, int64_t rows, int64_t keys)
{
    size_t lane = 0;
    for (; lane + 4 * LANES <= c->lanes; lane += 4 * LANES)
        weigh_rows(halves, 4, s, c, rows, lane, keys);
    for (; lane + 2 * LANES <= c->lanes; lane += 2 * LANES)
        weigh_rows(halves, 2, s, c, rows, lane, keys);
    if (lane < c->lanes)
        weigh_rows(halves, 1, s, c, rows, lane, keys);
}

/* One tile: `tokens` queries of one key head from position `position` on. `heads` are their rows of
 * q, `q_stride` floats apart; the results go to `out`, `out_stride` bytes apart. */
static void attend_tile(const Shape *s, Context *c, const float *heads, size_t q_stride, char *out,
                        size_t out_stride, int64_t position, int64_t tokens)
{
    int64_t group = s->heads / s->kv_heads, dim = s->head_dim, rows = group * tokens;
    int64_t keys = position + tokens;
    float scale = (float)(LOG2_E / __builtin_sqrt((double)dim)), sums[QUERY_ROWS];
    for (int64_t r = 0; r < rows; r++) /* what pads a query is zero and stays it */
        put(c->halves, heads + r / group * q_stride + r % group * dim, c->queries + r * c->stride,
            dim);
    score(s, c, rows, keys);
    for (int64_t r = 0; r < rows; r++)
        sums[r] = softmax(c->scores + r * c->score_stride, scale, position + r / group + 1, keys);
    if (c->halves)
        weigh_all(1, s, c, rows, keys);
    else
        weigh_all(0, s, c, rows, keys);
    for (int64_t r = 0; r < rows; r++) {
        float *found = c->found + r * c->lanes;
        for (int64_t i = 0; i < dim; i++)
            found[i] /= sums[r];
        put(s->halves != 0, found,
            out + r / group * out_stride + r % group * dim * (s->halves ? 2 : 4), dim);
    }
}
