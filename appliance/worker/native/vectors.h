/* Vectors of the widest kind that the compiler was told of, and the few operations on them.
 *
 * Every sum of products is a chain of `fused` per lane, in order, and one tree over the lanes
 * (`sum4`, `sum1`). The compiler may not contract or reorder anything (-ffp-contract=off, no fast
 * math), so a result's bits follow from this text and the vector width alone. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define VECTOR_BYTES (4 * LANES)
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (__typeof__((ints){0})){__VA_ARGS__})
#endif

/* Keeps a value in a register. Without it a load is repeated as an operand of each use, and the loads
 * become the bound. */
#if defined(__AVX512F__) || defined(__AVX__)
#define KEEP(value) __asm__("" : "+v"(value))
#else
#define KEEP(value) ((void)0)
#endif

INLINE floats splat(float value) { return value - (floats){0}; }

INLINE floats load(const void *from) { return *(const floats *)from; }

/* The first `bytes` of a vector, zeros after them; nothing beyond is read. */
INLINE floats load_part(const void *from, size_t bytes)
{
    floats value = {0};
    memcpy(&value, from, bytes);
    return value;
}

INLINE floats fused(floats a, floats b, floats sum)
{
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__) && LANES == 8
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + sum;
#endif
}

INLINE floats larger(floats a, floats b)
{
    ints mask = a > b;
    return (floats)(((ints)a & mask) | ((ints)b & ~mask));
}

/* The even and odd bfloat16 of each 32-bit lane, as float32. */
INLINE floats evens(floats pairs) { return (floats)((ints)pairs << 16); }
INLINE floats odds(floats pairs) { return (floats)((ints)pairs & (int32_t)0xffff0000); }

/* sum + x * w over the elements of one vector: LANES float32, or 2 * LANES bfloat16 in pairs. */
INLINE floats multiplied(const int halves, floats x, floats w, floats sum)
{
    if (!halves)
        return fused(x, w, sum);
#if defined(__AVX512BF16__)
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#else
    return fused(odds(x), odds(w), fused(evens(x), evens(w), sum));
#endif
}

/* The sums over the lanes of four vectors: the same tree for each of them. */
INLINE four sum4(floats a, floats b, floats c, floats d)
{
#if LANES == 16
    floats ab = SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    floats cd = SHUFFLE(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                SHUFFLE(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    floats all = SHUFFLE(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                 SHUFFLE(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    four part[4];
    memcpy(part, &all, sizeof part);
    return (part[0] + part[2]) + (part[1] + part[3]);
#elif LANES == 8
    floats ab = SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    floats cd = SHUFFLE(c, d, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
    floats all = SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                 SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    four part[2];
    memcpy(part, &all, sizeof part);
    return part[0] + part[1];
#else
    floats ab = SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7);
    floats cd = SHUFFLE(c, d, 0, 4, 1, 5) + SHUFFLE(c, d, 2, 6, 3, 7);
    return (four)(SHUFFLE(ab, cd, 0, 1, 4, 5) + SHUFFLE(ab, cd, 2, 3, 6, 7));
#endif
}

INLINE float sum1(floats a) { return sum4(a, a, a, a)[0]; }

/* 2^x, about 2 units in the last place; 0 below -126, the value at 126 above it, NaN for NaN. */
INLINE floats power_of_two(floats x)
{
    const floats round = splat(12582912.0f); /* 1.5 * 2^23: adding it leaves the integer */
    ints high = x > splat(126.0f);
    x = (floats)(((ints)splat(126.0f) & high) | ((ints)x & ~high));
    ints low = x < splat(-126.0f);
    floats whole = (x + round) - round;
    floats rest = x - whole;
    floats p = splat(1.535336188e-4f);
    p = fused(p, rest, splat(1.339887440e-3f));
    p = fused(p, rest, splat(9.618437357e-3f));
    p = fused(p, rest, splat(5.550332548e-2f));
    p = fused(p, rest, splat(2.402264791e-1f));
    p = fused(p, rest, splat(6.931472028e-1f));
    p = fused(p, rest, splat(1.0f));
    ints exponent = ((ints)(x + round) - (ints)round + 127) << 23;
    return (floats)((ints)(p * (floats)exponent) & ~low);
}
