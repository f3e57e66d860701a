// Attention of many tokens, in FlashAttention-2's order (arXiv 2307.08691, section 3.1): products
// of tiles at the speed of matrix products. In bfloat16 weights are rounded before they meet V.
//
// Tiles begin at multiples of KT, so what a position gets does not depend on how its prompt was cut
// into chunks.

#pragma once

#include "batch.h"

namespace {

// Sums of MB rows and N vectors over `depth` 32-bit units: floats, or pairs of bfloat16.
template <bool BF, int N>
inline void multiply(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int depth,
                     vf (&acc)[MB][N]) {
    for (int k = 0; k < depth; k++) {
        vu x[N];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) x[j] = load<vu>(b + k * ldb + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < MB; i++) {
#if DOTS
            if (BF) {
                __m512bh y = (__m512bh)_mm512_set1_epi32(int32_t(a[i * lda + k]));
#pragma GCC unroll 8
                for (int j = 0; j < N; j++)
                    acc[i][j] = (vf)_mm512_dpbf16_ps((__m512)acc[i][j], y, (__m512bh)x[j]);
                continue;
            }
#endif
            const float y = as_float(a[i * lda + k]);
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) acc[i][j] += y * (vf)x[j];
        }
    }
}

template <bool BF, int N>
inline void add_panel(const uint32_t* weights, const uint32_t* v, int64_t ldv, int depth,
                      const float* shrink, float* out, int64_t stride) {
    vf acc[MB][N];
#pragma GCC unroll 8
    for (int i = 0; i < MB; i++)
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) acc[i][j] = load<vf>(out + i * stride + j * W) * shrink[i];
    multiply<BF, N>(weights, KT, v, ldv, depth, acc);
#pragma GCC unroll 8
    for (int i = 0; i < MB; i++)
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) store(out + i * stride + j * W, acc[i][j]);
}

template <bool BF>
inline void add_values(const uint32_t* weights, const uint32_t* v, int dim, int depth,
                       const float* shrink, float* out) {
    int at = 0;
    for (; at + NB * W <= dim; at += NB * W)
        add_panel<BF, NB>(weights, v + at, dim, depth, shrink, out + at, dim);
    for (; at < dim; at += W) add_panel<BF, 1>(weights, v + at, dim, depth, shrink, out + at, dim);
}

template <bool BF>
inline void scores_tile(const uint32_t* q, int units, const uint32_t* k, float (*out)[KT]) {
    for (int at = 0; at < KT; at += NB * W) {
        vf acc[MB][NB] = {};
        multiply<BF, NB>(q, units, k + at, KT, units, acc);
#pragma GCC unroll 8
        for (int i = 0; i < MB; i++)
#pragma GCC unroll 8
            for (int j = 0; j < NB; j++) store(out[i] + at + j * W, acc[i][j]);
    }
}

#if WIDE
// 16 x 16 units, transposed.
inline void turn(const char* const* rows, int at, uint32_t* out, int64_t stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i] + at * 4);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
        a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
    }
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (at + i) * stride, a[i]);
}
#endif

// Keys of a tile as [units][KT]; values as [KT / 2][dim] pairs of tokens, or [KT][dim] floats.
template <bool BF>
void pack(const char* const* k, const char* const* v, int n, int dim, uint32_t* keys,
          uint32_t* values) {
    const int units = BF ? dim / 2 : dim;
    int t = 0;
#if WIDE
    for (; t + 16 <= n; t += 16)
        for (int u = 0; u < units; u += 16) turn(k + t, u, keys + t, KT);
#endif
    for (; t < n; t++) {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(k[t]);
        for (int u = 0; u < units; u++) keys[u * KT + t] = from[u];
    }
    if (t < KT)
        for (int u = 0; u < units; u++) std::fill(keys + u * KT + t, keys + (u + 1) * KT, 0u);
    for (t = 0; t < n; t += BF ? 2 : 1) {
        uint32_t* to = values + int64_t(BF ? t / 2 : t) * dim;
        if (!BF) { std::memcpy(to, v[t], dim * 4); continue; }
        const bf16* a = reinterpret_cast<const bf16*>(v[t]);
        if (t + 1 == n) { for (int d = 0; d < dim; d++) to[d] = a[d]; continue; }
        const bf16* b = reinterpret_cast<const bf16*>(v[t + 1]);
        for (int d = 0; d < dim; d++) to[d] = uint32_t(a[d]) | uint32_t(b[d]) << 16;
    }
}

// MB rows of weights as multiply() wants them.
template <bool BF> inline void lay_weights(const float (*w)[KT], uint32_t (*out)[KT]) {
    for (int i = 0; i < MB; i++) {
#if DOTS
        if (BF) {
            for (int t = 0; t < KT; t += W) {
                __m256bh p = _mm512_cvtneps_pbh(_mm512_loadu_ps(w[i] + t));
                store(out[i] + t / 2, p);
            }
            continue;
        }
#endif
        std::memcpy(out[i], w[i], sizeof out[i]);
    }
}

struct Block { int64_t span, head, first, last; };  // rows [first, last) of a span and KV head

// One Q block. Row r is query head r % group of token r / group; rows up to a multiple of MB repeat
// the last. BF: units are pairs of bfloat16.
template <bool BF> class Tiles {
  public:
    Tiles(const Batch& b, const Layer& l, const Block& one, Scratch& scratch)
        : b(b), l(l), one(one), dim(int(l.dim)), group(int(l.heads / l.kv_heads)),
          units(BF ? dim / 2 : dim), count(int(one.last - one.first)),
          padded((count + MB - 1) / MB * MB), direct(l.cache_kind == (BF ? BF16 : F32)) {
        const size_t rows = padded, d = dim, u = units, copied = direct ? 0 : 2 * KT + 1;
        scratch.begin(rows * (u * 4 + d * 4 + sizeof(State)) + KT * (u + d) * 4 +
                      copied * d * 4 + 2048);
        query = scratch.take<uint32_t>(rows * u);
        sums = scratch.take<float>(rows * d);
        states = scratch.take<State>(rows);
        keys = scratch.take<uint32_t>(KT * u);
        values = scratch.take<uint32_t>(KT * d);
        copies = scratch.take<float>(copied * d);
    }

    void run() {
        begin();
        const int64_t low = seen(0).low, high = seen(count - 1).high;
        for (int64_t base = low / KT * KT; base < high; base += KT) {
            const int n = int(std::min<int64_t>(KT, high - base));
            read(base, int(std::max<int64_t>(0, low - base)), n);
            for (int r = 0; r < padded; r += MB) add(r, base, n);
        }
        for (int r = 0; r < count; r++) {
            const Place to = place_of(r);
            finish(l, sums + int64_t(r) * dim, states[r], to.row, to.head);
        }
    }

  private:
    struct Place { int64_t row, head; };
    Place place_of(int r) const {
        const int64_t row = std::min<int64_t>(one.first + r, one.last - 1);
        return {b.span[one.span].at + row / group, one.head * group + row % group};
    }
    Sight seen(int r) const {
        return sight(b, one.span, std::min<int64_t>(one.first + r, one.last - 1) / group);
    }

    void begin() {
        for (int r = 0; r < padded; r++) {
            const Place at = place_of(r);
            const char* q = place(l.query, at.row, l.query_token, at.head, l.query_head,
                                  bytes_of(l.query_kind));
            uint32_t* to = query + int64_t(r) * units;
            if (BF) std::memcpy(to, q, dim * 2);
            else widen_row(q, l.query_kind, dim, reinterpret_cast<float*>(to));
            states[r] = State();
        }
        std::fill_n(sums, size_t(padded) * dim, 0.f);
    }

    // Positions [base, base + n), packed. The first `skip` are not looked at by anyone, and stand
    // for the one after them.
    void read(int64_t base, int skip, int n) {
        const Slots slots{b.tables + b.span[one.span].table_at, b.block_size};
        const int cache = bytes_of(l.cache_kind);
        int64_t slot[KT];
        const char *k[KT], *v[KT];
        slots.read(base + skip, n - skip, n - skip, slot + skip);
        std::fill_n(slot, skip, slot[skip]);
        for (int t = 0; t < n; t++) {
            k[t] = place(l.key, slot[t], l.key_token, one.head, l.key_head, cache);
            v[t] = place(l.value, slot[t], l.value_token, one.head, l.value_head, cache);
            if (direct) continue;
            k[t] = copy(k[t], t);
            v[t] = copy(v[t], KT + t);
        }
        pack<BF>(k, v, n, dim, keys, values);
    }

    // A vector of the cache in the form that is computed with.
    const char* copy(const char* from, int place) {
        float* wide = copies + int64_t(2 * KT) * dim;
        char* to = reinterpret_cast<char*>(copies + int64_t(place) * dim);
        widen_row(from, l.cache_kind, dim, wide);
        put(wide, 1.f, dim, to, BF ? BF16 : F32);
        return to;
    }

    // What rows [r, r + MB) get from the tile.
    void add(int r, int64_t base, int n) {
        const Sight first = seen(r), last = seen(r + MB - 1);
        if (last.high <= base || first.low >= base + n) return;
        alignas(64) float scores[MB][KT];
        alignas(64) uint32_t weights[MB][KT];
        float shrink[MB];
        scores_tile<BF>(query + int64_t(r) * units, units, keys, scores);
        const bool whole = first.high >= base + KT && last.low <= base;
        for (int i = 0; i < MB; i++) {
            State& state = states[r + i];
            shrink[i] = whole ? soften<false>(scores[i], KT, 0, KT, l.scale, l.softcap, state)
                              : part(scores[i], seen(r + i), base, n, state);
        }
        lay_weights<BF>(scores, weights);
        const int depth = BF ? (n + 1) / 2 : n;
        add_values<BF>(weights[0], values, dim, depth, shrink, sums + int64_t(r) * dim);
    }

    float part(float* scores, Sight s, int64_t base, int n, State& state) {
        const int from = int(std::max<int64_t>(0, s.low - base));
        const int to = int(std::min<int64_t>(n, s.high - base));
        if (from < to) return soften<true>(scores, KT, from, to, l.scale, l.softcap, state);
        std::fill_n(scores, KT, 0.f);
        return 1.f;
    }

    const Batch& b;
    const Layer& l;
    const Block& one;
    const int dim, group, units, count, padded;
    const bool direct;  // the cache holds what is computed with
    uint32_t *query, *keys, *values;  // [rows][units], [units][KT], [KT / 2 or KT][dim]
    float *sums, *copies;             // [rows][dim]; 2 KT vectors, and one more
    State* states;
};

}  // namespace
