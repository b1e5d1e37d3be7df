/* Vectors of float32 as wide as the machine has them, and what is computed with them. */

#ifndef LANES_H
#define LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <omp.h>

#if defined(__AVX512F__)
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif

typedef float Lanes __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Numbers __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#define ROUNDER 12582912.0f /* 1.5 * 2^23: adding it to a number leaves a whole one */
#define AT(pointer) (*(Lanes *)(pointer))
#define INLINE static inline __attribute__((always_inline))

INLINE Lanes all(float value) { return value - (Lanes){}; }

INLINE Lanes choose(Numbers which, Lanes yes, Lanes no) {
    return (Lanes)(((Numbers)yes & which) | ((Numbers)no & ~which));
}

/* a * b + c, rounded once where the machine can. */
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE float most_of(Lanes x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

INLINE float total(Lanes x) {
    float sums[LANES];
    memcpy(sums, &x, sizeof sums);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) sums[i] += sums[i + width];
    return sums[0];
}

/* The totals of four vectors. */
INLINE void totals(const Lanes *x, float *out) {
#if defined(__AVX__)
#if defined(__AVX512F__)
#define PART(i) \
    _mm256_add_ps(_mm512_castps512_ps256((__m512)x[i]), \
                  _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)x[i]), 1)))
#else
#define PART(i) (__m256) x[i]
#endif
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(PART(0), PART(1)), _mm256_hadd_ps(PART(2), PART(3)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#undef PART
#else
    for (int i = 0; i < 4; i++) out[i] = total(x[i]);
#endif
}

INLINE float dot(const float *a, const float *b, int64_t length) {
    Lanes even = all(0), odd = all(0);
    int64_t i = 0;
    for (; i + 2 * LANES <= length; i += 2 * LANES) {
        even = multiply_add(AT(a + i), AT(b + i), even);
        odd = multiply_add(AT(a + i + LANES), AT(b + i + LANES), odd);
    }
    for (; i + LANES <= length; i += LANES) even = multiply_add(AT(a + i), AT(b + i), even);
    float sum = total(even + odd);
    for (; i < length; i++) sum += a[i] * b[i];
    return sum;
}

/* e^x within some units in the last place: 2^n by its exponent times e^(x - n ln 2) by a polynomial. NaN stays. */
INLINE Lanes exponential(Lanes x) {
    const Lanes rounder = all(ROUNDER);
    x = choose(x > 88.0f, all(88.0f), x);
    x = choose(x < -87.0f, all(-87.0f), x);
    Lanes shifted = x * 1.44269504f + rounder, n = shifted - rounder;
    Lanes r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Lanes p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    Lanes power = (Lanes)((Numbers)p + (((Numbers)shifted - (Numbers)rounder) << 23));
    return choose(x == x, power, x);
}

#endif
