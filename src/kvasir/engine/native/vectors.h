// Vectors of floats, as wide as the processor's, and what there is no instruction for. GCC's and
// clang's vector types are all that a processor without AVX-512 needs.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#else
#define WIDE 0
#endif
#if WIDE && defined(__AVX512BF16__)
#define DOTS 1  // products of pairs of bfloat16 in one instruction
#else
#define DOTS 0
#endif

namespace {

constexpr int W = WIDE ? 16 : 8;   // floats of a vector
constexpr int NB = WIDE ? 4 : 2;   // vectors of a panel: MB x NB sums stay in registers
constexpr int MB = 6;              // rows of a micro tile
constexpr int KT = 64;             // tokens of a tile
constexpr int QB = 64 * MB;        // rows of a Q block: its sums stay in the second-level cache
constexpr int ROWS_MAX = 8;        // query heads of a KV head that rows() takes; else tile()
constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.69314718055994531f;

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t bf16;

template <class V> inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
inline vf all(float x) { return x - vf{}; }
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline float as_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline float widen(bf16 x) { return as_float(uint32_t(x) << 16); }
inline bf16 narrow(float x) {  // to nearest, ties to even; NaN stays one
    uint32_t u; std::memcpy(&u, &x, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return bf16(u >> 16 | 0x40);
    return bf16((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

#if WIDE
inline float sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
inline float top(vf v) { return _mm512_reduce_max_ps((__m512)v); }
#else
inline float sum(vf v) {
    float s[W]; store(s, v);
    for (int h = W / 2; h; h /= 2) for (int i = 0; i < h; i++) s[i] += s[i + h];
    return s[0];
}
inline float top(vf v) {
    float s[W]; store(s, v);
    for (int h = W / 2; h; h /= 2) for (int i = 0; i < h; i++) s[i] = std::max(s[i], s[i + h]);
    return s[0];
}
#endif

// 2^x for x <= 0. Polynomial by least squares of the relative error: 8e-8.
inline vf exp2(vf x) {
    constexpr float C0 = 1.0000000710296986f, C1 = 0.6931469491610637f, C2 = 0.24022121753561904f;
    constexpr float C3 = 0.05550742616003147f, C4 = 0.009675459745507556f;
    constexpr float C5 = 0.0013266970386063871f;
    x = max(x, all(-126.f));
#if WIDE
    vf n = (vf)_mm512_roundscale_ps((__m512)x, 0);
#else
    const vf magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds
    vf n = (x + magic) - magic;
#endif
    vf f = x - n;
    vf p = ((((f * C5 + C4) * f + C3) * f + C2) * f + C1) * f + C0;
#if WIDE
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    vi shift = __builtin_convertvector(n, vi) << 23;
    return (vf)((vi)p + shift);
#endif
}

#if WIDE
// Sums of 16 vectors, in order.
inline vf sums(const vf* a) {
    __m512 t[8], u[4];
    for (int i = 0; i < 8; i++)
        t[i] = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a[2 * i], (__m512)a[2 * i + 1]),
                             _mm512_unpackhi_ps((__m512)a[2 * i], (__m512)a[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d x = (__m512d)t[2 * i], y = (__m512d)t[2 * i + 1];
        u[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(x, y), (__m512)_mm512_unpackhi_pd(x, y));
    }
    auto halves = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return (vf)halves(halves(u[0], u[1]), halves(u[2], u[3]));
}
#else
inline vf sums(const vf* a) {
    vf out;
    for (int i = 0; i < W; i++) out[i] = sum(a[i]);
    return out;
}
#endif

}  // namespace
