/* The forward pass of a step in one call: token ids in, float32 logits of the sampling rows out.
 *
 * Rows are tokens of many sequences, one after the other. Whatever is computed for a row reads that
 * row, the weights and its own sequence's keys and values, in an order that does not depend on the
 * other rows; so a token's logits are the same bits alone, in a batch, in a prompt's chunk or as a
 * decode step. Weights are read where the node keeps them; vectors (norms, biases) are float32. */
#include "attention.h"
#include <stdlib.h>

enum { BLOCK_ROWS = 96 }; /* rows that go through a feed-forward layer together */

typedef struct {
    const float *attn_norm, *qkv_bias, *q_norm, *k_norm, *output_bias, *mlp_norm;
    const char *qkv, *output, *gate_up, *down;
} Layer;

typedef struct {
    Shape shape;
    double norm_eps;
    const char *embed, *lm_head;
    const float *norm, *cos, *sin; /* [positions, head_dim], the sign of the swap in `sin` */
    const Layer *layers;
} Model;

typedef struct {
    const int64_t *tokens; /* from the sequence's first */
    const int64_t *table;
    int64_t start, count, samples;
} Sequence;

typedef struct {
    float *x, *qkv, *gate_up;
    char *inputs, *attended, *gated;
    size_t input_stride, attended_stride, gated_stride; /* bytes */
    Context context;
    int64_t rows, keys; /* what there is room for */
} Buffers;

typedef struct {
    Model model;
    Buffers buffers;
} Engine;

static size_t padded(const Shape *s, int64_t elements)
{
    return (size_t)round_up(elements * (s->halves ? 2 : 4), VECTOR_BYTES);
}

static int64_t qkv_columns(const Shape *s) { return (s->heads + 2 * s->kv_heads) * s->head_dim; }

/* A zeroed buffer in place of the old one; 0 when there is no memory. */
static int renew(void *where, size_t bytes)
{
    void *fresh = 0, **old = where;
    bytes += VECTOR_BYTES; /* a vector may be read at the last element */
    if (posix_memalign(&fresh, 64, bytes))
        return 0;
    memset(fresh, 0, bytes);
    free(*old);
    *old = fresh;
    return 1;
}

static int make_room(Engine *e, int64_t rows, int64_t keys)
{
    const Shape *s = &e->model.shape;
    Buffers *b = &e->buffers;
    Context *c = &b->context;
    int good = 1;
    if (rows > b->rows) {
        int64_t block = rows > BLOCK_ROWS ? rows : BLOCK_ROWS;
        good = good && renew(&b->x, (size_t)(block * s->hidden) * 4);
        good = good && renew(&b->qkv, (size_t)(block * qkv_columns(s)) * 4);
        good = good && renew(&b->attended, (size_t)block * b->attended_stride);
        good = good && renew(&b->inputs, (size_t)block * b->input_stride);
        good = good && renew(&b->gate_up, (size_t)(BLOCK_ROWS * 2 * s->ff) * 4);
        good = good && renew(&b->gated, BLOCK_ROWS * b->gated_stride);
        b->rows = good ? block : 0;
    }
    if (keys > b->keys) {
        int64_t blocks = keys / s->block_tokens + 1;
        size_t copied = (size_t)(blocks * s->block_tokens) * c->lanes * 4;
        c->score_stride = (size_t)round_up(keys, LANES) + LANES;
        good = good && renew(&c->keys, (size_t)blocks * sizeof(char *));
        good = good && renew(&c->values, (size_t)blocks * sizeof(char *));
        good = good && renew(&c->scores, QUERY_ROWS * c->score_stride * 4);
        good = good && renew(&c->queries, QUERY_ROWS * c->stride);
        good = good && renew(&c->found, QUERY_ROWS * c->lanes * 4);
        if (!c->in_place) {
            good = good && renew(&c->key_rows, copied);
            good = good && renew(&c->value_rows, copied);
        }
        b->keys = good ? keys : 0;
    }
    return good;
}

/* x / sqrt(mean of squares + eps) * scale */
static void normalise(const float *x, const float *scale, double eps, int64_t count, float *to)
{
    floats squares = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        squares = fused(load(x + i), load(x + i), squares);
    floats rest = load_part(x + i, (size_t)(count - i) * 4);
    float mean = sum1(fused(rest, rest, squares)) / (float)count;
    float factor = 1.0f / __builtin_sqrtf(mean + (float)eps);
    for (i = 0; i + LANES <= count; i += LANES)
        *(floats *)(to + i) = load(x + i) * splat(factor) * load(scale + i);
    for (; i < count; i++)
        to[i] = x[i] * factor * scale[i];
}

static void normalised_rows(const Model *m, const float *x, const float *scale, int64_t rows,
                            float *scratch, char *to, size_t stride)
{
    int64_t hidden = m->shape.hidden;
    for (int64_t r = 0; r < rows; r++) {
        float *row = m->shape.halves ? scratch : (float *)(to + r * stride);
        normalise(x + r * hidden, scale, m->norm_eps, hidden, row);
        if (m->shape.halves)
            put(1, row, to + r * stride, hidden);
    }
}

static void rotate(float *head, const float *cos, const float *sin, int64_t dim)
{
    int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float low = head[i], high = head[i + half];
        head[i] = low * cos[i] + high * sin[i];
        head[i + half] = high * cos[i + half] + low * sin[i + half];
    }
}

/* Bias, norm and rotation of a row's heads; its keys and values go to the pool. */
static void finish_heads(const Model *m, const Layer *l, int64_t layer, float *row,
                         const int64_t *table, int64_t position)
{
    const Shape *s = &m->shape;
    int64_t dim = s->head_dim, rotated = s->heads + s->kv_heads, size = s->halves ? 2 : 4;
    int64_t token = position % s->block_tokens;
    if (l->qkv_bias)
        for (int64_t i = 0; i < qkv_columns(s); i++)
            row[i] += l->qkv_bias[i];
    for (int64_t h = 0; h < rotated; h++) {
        if (l->q_norm)
            normalise(row + h * dim, h < s->heads ? l->q_norm : l->k_norm, m->norm_eps, dim,
                      row + h * dim);
        rotate(row + h * dim, m->cos + position * dim, m->sin + position * dim, dim);
    }
    for (int64_t kv = 0; kv < 2; kv++)
        for (int64_t h = 0; h < s->kv_heads; h++) {
            char *to = pool_rows(s, table[position / s->block_tokens], layer, kv, h);
            put(s->halves != 0, row + (s->heads + kv * s->kv_heads + h) * dim,
                to + token * dim * size, dim);
        }
}

/* Attention of a sequence's tokens `first .. count`, whose rows of q begin at `heads`. */
static void attend(Engine *e, int64_t layer, const Sequence *q, int64_t first, const float *heads,
                   char *out)
{
    const Shape *s = &e->model.shape;
    Context *c = &e->buffers.context;
    int64_t group = s->heads / s->kv_heads, size = s->halves ? 2 : 4;
    int64_t step = group < QUERY_ROWS ? QUERY_ROWS / group : 1;
    size_t stride = e->buffers.attended_stride, q_stride = (size_t)qkv_columns(s);
    for (int64_t h = 0; h < s->kv_heads; h++) {
        find_context(s, c, q->table, layer, h, q->start + q->count);
        for (int64_t t = first; t < q->count; t += step) {
            int64_t tokens = q->count - t < step ? q->count - t : step;
            int64_t at = h * group * s->head_dim;
            attend_tile(s, c, heads + (t - first) * q_stride + at, q_stride,
                        out + (t - first) * stride + at * size, stride, q->start + t, tokens);
        }
    }
}

/* silu(gate) * up of one row. */
static void gate(const Shape *s, const float *row, char *to)
{
    const floats minus_log2e = splat((float)-LOG2_E), one = splat(1);
    for (int64_t i = 0; i < s->ff; i += LANES) {
        int64_t count = s->ff - i < LANES ? s->ff - i : LANES;
        size_t bytes = (size_t)count * 4;
        int whole = count == LANES;
        floats g = whole ? load(row + i) : load_part(row + i, bytes);
        floats up = whole ? load(row + s->ff + i) : load_part(row + s->ff + i, bytes);
        floats found = g / (one + power_of_two(g * minus_log2e)) * up;
        float values[LANES];
        memcpy(values, &found, sizeof found);
        put(s->halves != 0, values, to + i * (s->halves ? 2 : 4), count);
    }
}

static void add_bias(float *x, const float *bias, int64_t rows, int64_t columns)
{
    for (int64_t r = 0; bias && r < rows; r++)
        for (int64_t i = 0; i < columns; i++)
            x[r * columns + i] += bias[i];
}

/* What follows attention in a layer, for `rows` rows of x. */
static void feed_forward(Engine *e, const Layer *l, int64_t rows)
{
    const Model *m = &e->model;
    const Shape *s = &m->shape;
    Buffers *b = &e->buffers;
    int halves = s->halves != 0;
    for (int64_t row = 0; row < rows; row += BLOCK_ROWS) {
        int64_t count = rows - row < BLOCK_ROWS ? rows - row : BLOCK_ROWS;
        float *x = b->x + row * s->hidden;
        Matrices output = {.x = b->attended + row * b->attended_stride,
                           .x_stride = b->attended_stride, .w = l->output,
                           .y = x, .y_stride = (size_t)s->hidden};
        product(halves, output, count, s->hidden, s->heads * s->head_dim, ADD);
        add_bias(x, l->output_bias, count, s->hidden);
        normalised_rows(m, x, l->mlp_norm, count, b->gate_up, b->inputs, b->input_stride);
        Matrices gate_up = {.x = b->inputs, .x_stride = b->input_stride, .w = l->gate_up,
                            .y = b->gate_up, .y_stride = (size_t)(2 * s->ff)};
        product(halves, gate_up, count, 2 * s->ff, s->hidden, SET);
        for (int64_t r = 0; r < count; r++)
            gate(s, b->gate_up + r * 2 * s->ff, b->gated + r * b->gated_stride);
        Matrices down = {.x = b->gated, .x_stride = b->gated_stride, .w = l->down, .y = x,
                         .y_stride = (size_t)s->hidden};
        product(halves, down, count, s->hidden, s->ff, ADD);
    }
}

static void start_rows(Engine *e, const Sequence *q, int64_t sequences)
{
    const Model *m = &e->model;
    int64_t hidden = m->shape.hidden;
    float *x = e->buffers.x;
    for (int64_t i = 0; i < sequences; i++)
        for (int64_t t = 0; t < q[i].count; t++, x += hidden) {
            int64_t id = q[i].tokens[q[i].start + t];
            if (m->shape.halves)
                widen((const uint16_t *)m->embed + id * hidden, x, hidden);
            else
                memcpy(x, (const float *)m->embed + id * hidden, (size_t)hidden * 4);
        }
}

/* One layer. After the last only the sampling rows are wanted: they are moved to the front. Returns
 * how many rows x has then. */
static int64_t run_layer(Engine *e, int64_t layer, const Sequence *q, int64_t sequences,
                         int64_t rows)
{
    const Model *m = &e->model;
    const Shape *s = &m->shape;
    const Layer *l = &m->layers[layer];
    Buffers *b = &e->buffers;
    int64_t columns = qkv_columns(s), hidden = s->hidden, wanted = 0;
    int last = layer == s->layers - 1;
    normalised_rows(m, b->x, l->attn_norm, rows, b->gate_up, b->inputs, b->input_stride);
    Matrices qkv = {.x = b->inputs, .x_stride = b->input_stride, .w = l->qkv, .y = b->qkv,
                    .y_stride = (size_t)columns};
    product(s->halves != 0, qkv, rows, columns, hidden, SET);
    for (int64_t i = 0, row = 0; i < sequences; i++) {
        int64_t first = !last ? 0 : q[i].samples ? q[i].count - 1 : q[i].count;
        for (int64_t t = 0; t < q[i].count; t++)
            finish_heads(m, l, layer, b->qkv + (row + t) * columns, q[i].table, q[i].start + t);
        if (first < q[i].count) {
            attend(e, layer, &q[i], first, b->qkv + (row + first) * columns,
                   b->attended + wanted * b->attended_stride);
            if (last)
                memmove(b->x + wanted * hidden, b->x + (row + first) * hidden, (size_t)hidden * 4);
            wanted += q[i].count - first;
        }
        row += q[i].count;
    }
    feed_forward(e, l, wanted);
    return wanted;
}

/* The first index of the largest logit; -1 when a logit is NaN or the largest is infinite. */
static int64_t largest(const float *logits, int64_t count)
{
    floats most = splat(logits[0]);
    ints proper = most == most;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        floats part = load(logits + i);
        most = larger(part, most);
        proper &= part == part;
    }
    float best = most[0];
    int good = 1;
    for (int lane = 0; lane < LANES; lane++) {
        best = most[lane] > best ? most[lane] : best;
        good &= proper[lane] != 0;
    }
    for (; i < count; i++) {
        best = logits[i] > best ? logits[i] : best;
        good &= logits[i] == logits[i];
    }
    if (!good || best - best != 0)
        return -1;
    for (i = 0; logits[i] != best; i++)
        ;
    return i;
}

/* --- what the worker calls ------------------------------------------------------------------- */

void appliance_close(Engine *e)
{
    Buffers *b = &e->buffers;
    Context *c = &b->context;
    void *all[] = {b->x, b->qkv, b->gate_up, b->inputs, b->attended, b->gated,
                   (void *)c->keys, (void *)c->values, c->key_rows, c->value_rows, c->queries,
                   c->found, c->scores, e};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* An engine with room for the usual step, or 0 when there is no memory. The model is copied; what
 * it points to must stay. */
Engine *appliance_open(const Model *model, int64_t rows, int64_t keys)
{
    Engine *e = calloc(1, sizeof *e);
    if (!e)
        return 0;
    const Shape *s = &model->shape;
    e->model = *model;
    e->buffers.input_stride = padded(s, s->hidden);
    e->buffers.attended_stride = padded(s, s->heads * s->head_dim);
    e->buffers.gated_stride = padded(s, s->ff);
    describe_context(s, &e->buffers.context);
    if (!make_room(e, rows, keys)) {
        appliance_close(e);
        return 0;
    }
    return e;
}

/* Whether ids, positions and blocks are within the model and the pool: nothing else is read. */
static int is_within(const Shape *s, const Sequence *q)
{
    int64_t end = q->start + q->count;
    if (q->start < 0 || q->count < 1 || end > s->positions)
        return 0;
    for (int64_t t = q->start; t < end; t++)
        if (q->tokens[t] < 0 || q->tokens[t] >= s->vocab)
            return 0;
    for (int64_t b = 0; b * s->block_tokens < end; b++)
        if (q->table[b] < 0 || q->table[b] >= s->blocks)
            return 0;
    return 1;
}

/* Computes a step. `logits [samples, vocab]` and `best [samples]` (see `largest`) of the sequences
 * that sample, in their order. Returns 0, -1 when there is no memory, or the number of the first
 * sequence, from 1, that is out of bounds (then nothing was computed). */
int64_t appliance_step(Engine *e, const Sequence *q, int64_t sequences, float *logits,
                       int64_t *best)
{
    const Model *m = &e->model;
    const Shape *s = &m->shape;
    Buffers *b = &e->buffers;
    int64_t rows = 0, keys = 0;
    for (int64_t i = 0; i < sequences; i++) {
        int64_t end = q[i].start + q[i].count;
        if (!is_within(s, &q[i]))
            return i + 1;
        rows += q[i].count;
        keys = end > keys ? end : keys;
    }
    if (!make_room(e, rows, keys))
        return -1;
    start_rows(e, q, sequences);
    for (int64_t layer = 0; layer < s->layers; layer++)
        rows = run_layer(e, layer, q, sequences, rows);
    normalised_rows(m, b->x, m->norm, rows, b->gate_up, b->inputs, b->input_stride);
    Matrices head = {.x = b->inputs, .x_stride = b->input_stride, .w = m->lm_head, .y = logits,
                     .y_stride = (size_t)s->vocab};
    product(s->halves != 0, head, rows, s->vocab, s->hidden, SET);
    for (int64_t r = 0; r < rows; r++)
        best[r] = largest(logits + r * s->vocab, s->vocab);
    return 0;
}

int64_t appliance_lanes(void) { return LANES; }

/* Whether bfloat16 is multiplied in pairs by the machine. */
int64_t appliance_pairs(void)
{
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}
