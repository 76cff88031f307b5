/* Products y = x W^T with W as the checkpoint has it, row-major [columns of y, depth].
 *
 * An element of y is the product of a row of x and a row of W: LANES chains over the depth, then a
 * tree. How many rows and columns are computed together, and where the depth is cut to stay in the
 * caches, changes nothing of that, so a row's bits do not depend on the rows beside it.
 *
 * Four rows of W meet up to MOST_ROWS rows of x in registers. Of x, so many rows and so much of the
 * depth are taken at a time that they stay in the first cache while W passes by, and of W as much as
 * stays in the second cache while the other rows of x follow. Chains that go on over a cut of the
 * depth wait in `carry`. */
#include "vectors.h"

enum {
    MOST_ROWS = 6,
    FIRST_CACHE = 36 << 10,   /* bytes of x, when one slice does */
    SLICE_BYTES = 24 << 10,   /* bytes of x in each of many slices */
    SECOND_CACHE = 512 << 10, /* bytes of W */
    DEPTH_BYTES = 3072,       /* a longer depth is cut into parts of at most this */
    LONGEST_WHOLE = 4096,     /* unless it is hardly longer */
    CARRIED_COLUMNS = 64,     /* columns of y whose chains can wait */
};
enum { SET, ADD };

typedef struct {
    const char *x;
    size_t x_stride;
    const char *w;
    size_t w_stride;
    float *y;
    size_t y_stride; /* in elements; the other strides are in bytes */
} Matrices;

/* One part of the depth: `whole` bytes in whole vectors, then `tail` bytes of one more. */
typedef struct {
    size_t whole, tail;
    int first, last;
    floats *carry; /* [rows, 4] of this tile, used where the part is not both first and last */
} Part;

INLINE void tile(const int rows, const int halves, Matrices m, Part p, int columns, int how)
{
    floats sum[MOST_ROWS][4];
    const char *w[4];
    for (int c = 0; c < 4; c++)
        w[c] = m.w + (c < columns ? c : 0) * m.w_stride;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++)
            sum[r][c] = p.first ? (floats){0} : p.carry[4 * r + c];
    for (size_t k = 0; k < p.whole; k += VECTOR_BYTES) {
        floats part[4];
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            part[c] = load(w[c] + k);
            __builtin_prefetch(w[c] + k + 4 * m.w_stride, 0, 3); /* the rows of the next tile */
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            floats x = load(m.x + r * m.x_stride + k);
            KEEP(x);
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++)
                sum[r][c] = multiplied(halves, x, part[c], sum[r][c]);
        }
    }
    if (p.tail) {
        floats part[4];
        for (int c = 0; c < 4; c++)
            part[c] = load_part(w[c] + p.whole, p.tail);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            floats x = load(m.x + r * m.x_stride + p.whole); /* padded with zeros */
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++)
                sum[r][c] = multiplied(halves, x, part[c], sum[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        if (!p.last) {
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++)
                p.carry[4 * r + c] = sum[r][c];
            continue;
        }
        float *y = m.y + r * m.y_stride;
        four found = sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
        if (columns == 4) {
            if (how == ADD)
                found += *(four *)y;
            *(four *)y = found;
        } else {
            for (int c = 0; c < columns; c++)
                y[c] = how == ADD ? y[c] + found[c] : found[c];
        }
    }
}

/* All rows of x against up to four rows of W, in groups of nearly equal size. */
INLINE void panel_of(const int halves, Matrices m, Part p, int columns, int64_t rows, int how)
{
    int64_t groups = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t group = 0, done = 0; group < groups; group++) {
        int count = (int)((rows - done + groups - group - 1) / (groups - group));
        switch (count) {
        case 1: tile(1, halves, m, p, columns, how); break;
        case 2: tile(2, halves, m, p, columns, how); break;
        case 3: tile(3, halves, m, p, columns, how); break;
        case 4: tile(4, halves, m, p, columns, how); break;
        case 5: tile(5, halves, m, p, columns, how); break;
        default: tile(6, halves, m, p, columns, how); break;
        }
        done += count;
        m.x += count * m.x_stride;
        m.y += count * m.y_stride;
        p.carry += count * 4;
    }
}

/* Compiled once for each type, and not again at each use. */
static __attribute__((noinline)) void panel_of_floats(const Matrices *m, const Part *p, int columns,
                                                      int64_t rows, int how)
{
    panel_of(0, *m, *p, columns, rows, how);
}

static __attribute__((noinline)) void panel_of_halves(const Matrices *m, const Part *p, int columns,
                                                      int64_t rows, int how)
{
    panel_of(1, *m, *p, columns, rows, how);
}

INLINE void panel(int halves, const Matrices *m, const Part *p, int columns, int64_t rows, int how)
{
    (halves ? panel_of_halves : panel_of_floats)(m, p, columns, rows, how);
}

/* A slice of rows against a block of columns, over the whole depth of `bytes`. */
static void block_of(int halves, Matrices m, int64_t rows, int64_t columns, size_t bytes, int how)
{
    floats carry[SLICE_BYTES / DEPTH_BYTES * CARRIED_COLUMNS];
    size_t most = bytes <= LONGEST_WHOLE ? bytes : DEPTH_BYTES;
    for (size_t begin = 0; begin < bytes; begin += most) {
        size_t size = bytes - begin < most ? bytes - begin : most;
        Part p = {.whole = size / VECTOR_BYTES * VECTOR_BYTES, .carry = carry};
        p.tail = size - p.whole;
        p.first = begin == 0;
        p.last = begin + size == bytes;
        Matrices part = m;
        part.x += begin;
        part.w += begin;
        for (int64_t column = 0; column < columns; column += 4) {
            int64_t left = columns - column;
            panel(halves, &part, &p, left < 4 ? (int)left : 4, rows, how);
            part.w += 4 * m.w_stride;
            part.y += 4;
            p.carry += 4 * rows;
        }
    }
}

/* y [rows, columns] = (SET) or += (ADD) x W^T over `depth` elements. x has the type of W and its
 * rows are padded with zeros to whole vectors. */
static void product(int halves, Matrices m, int64_t rows, int64_t columns, int64_t depth, int how)
{
    size_t bytes = m.w_stride = (size_t)depth * (halves ? 2 : 4);
    int cut = bytes > LONGEST_WHOLE;
    int64_t deep = cut ? DEPTH_BYTES : (int64_t)bytes;
    int64_t slice = FIRST_CACHE / deep;
    if (cut || rows > slice)
        slice = SLICE_BYTES / deep / MOST_ROWS * MOST_ROWS;
    if (cut && rows <= SLICE_BYTES / DEPTH_BYTES)
        slice = rows;
    slice = slice < MOST_ROWS ? MOST_ROWS : slice;
    int64_t block = SECOND_CACHE / (int64_t)bytes / 4 * 4;
    if (cut && block > CARRIED_COLUMNS)
        block = CARRIED_COLUMNS;
    block = block < 4 ? 4 : rows <= slice && !cut ? columns : block;
    for (int64_t column = 0; column < columns; column += block) {
        int64_t width = columns - column < block ? columns - column : block;
        Matrices part = m;
        part.w += column * m.w_stride;
        part.y += column;
        for (int64_t row = 0; row < rows; row += slice) {
            int64_t count = rows - row < slice ? rows - row : slice;
            block_of(halves, part, count, width, bytes, how);
            part.x += slice * m.x_stride;
            part.y += slice * m.y_stride;
        }
    }
}
