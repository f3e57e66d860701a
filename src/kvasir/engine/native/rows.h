// Attention of one token: a matrix and a vector for each KV head, limited by memory. Sums and
// weights are float32.

#pragma once

#include "batch.h"

namespace {

// A query's vector, W 32-bit units at a time, with a key's: floats, or pairs of bfloat16. Where
// these have no instruction, a pair's low halves lie W floats before its high ones.
inline vf dots_f32(vf sum, const char* q, const char* k, int i) {
    return sum + load<vf>(q + i * W * 4) * load<vf>(k + i * W * 4);
}
inline vf dots_bf16(vf sum, const char* q, const char* k, int i) {
#if DOTS
    const vu a = load<vu>(q + i * W * 4), b = load<vu>(k + i * W * 4);
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    vu both = load<vu>(k + i * W * 4);
    sum += load<vf>(q + i * W * 8) * (vf)(both << 16);
    return sum + load<vf>(q + i * W * 8 + W * 4) * (vf)(both & 0xffff0000u);
#endif
}

// Scores of `n` tokens, a multiple of W.
template <bool BF>
inline void scores_of(const char* q, const char* const* k, int n, int units, float* out) {
    for (int t = 0; t < n; t += W) {
        vf acc[W] = {};
        for (int i = 0; i < units; i++)
#pragma GCC unroll 16
            for (int j = 0; j < W; j++)
                acc[j] = BF ? dots_bf16(acc[j], q, k[t + j], i) : dots_f32(acc[j], q, k[t + j], i);
        store(out + t, sums(acc));
    }
}

// out[g] = out[g] * shrink[g] + weights[g] x V, of G rows and one panel of N units of W. In
// bfloat16 a unit's low halves are kept W floats before its high ones.
template <bool BF, int G, int N>
inline void gather(const float* weights, const char* const* v, int n, int at, const float* shrink,
                   float* out, int64_t stride) {
    constexpr int M = BF ? 2 * N : N;
    vf acc[G][M];
    float* first = out + at * (BF ? 2 : 1) * W;
    for (int g = 0; g < G; g++)
        for (int m = 0; m < M; m++) acc[g][m] = load<vf>(first + g * stride + m * W) * shrink[g];
    for (int t = 0; t < n; t++) {
        vf x[M];
        for (int i = 0; i < N; i++) {
            if (BF) {
                vu both = load<vu>(v[t] + (at + i) * W * 4);
                x[2 * i] = (vf)(both << 16);
                x[2 * i + 1] = (vf)(both & 0xffff0000u);
            } else {
                x[i] = load<vf>(v[t] + (at + i) * W * 4);
            }
        }
        for (int g = 0; g < G; g++)
            for (int m = 0; m < M; m++) acc[g][m] += weights[g * KT + t] * x[m];
    }
    for (int g = 0; g < G; g++)
        for (int m = 0; m < M; m++) store(first + g * stride + m * W, acc[g][m]);
}

template <bool BF, int G>
inline void gather_all(const float* weights, const char* const* v, int n, int units,
                       const float* shrink, float* out, int64_t stride) {
    constexpr int N = BF ? NB / 2 : NB;
    int at = 0;
    for (; at + N <= units; at += N) gather<BF, G, N>(weights, v, n, at, shrink, out, stride);
    for (; at < units; at++) gather<BF, G, 1>(weights, v, n, at, shrink, out, stride);
}

template <bool BF>
inline void gather_rows(int rows, const float* weights, const char* const* v, int n, int units,
                        const float* shrink, float* out, int64_t stride) {
    constexpr int G = WIDE ? 4 : 2;
    for (int g = 0; g < rows; g += G) {
        const float* w = weights + g * KT;
        float* o = out + g * stride;
        const int left = rows - g;
        if (left >= G) gather_all<BF, G>(w, v, n, units, shrink + g, o, stride);
        else if (left == 3) gather_all<BF, 3>(w, v, n, units, shrink + g, o, stride);
        else if (left == 2) gather_all<BF, 2>(w, v, n, units, shrink + g, o, stride);
        else gather_all<BF, 1>(w, v, n, units, shrink + g, o, stride);
    }
}

// A query of one head as scores_of() wants it.
inline void lay(const char* q, int32_t kind, bool bf, int dim, char* out) {
    if (bf && !DOTS) {
        float* to = reinterpret_cast<float*>(out);
        const bf16* from = reinterpret_cast<const bf16*>(q);
        for (int at = 0; at < dim; at += 2 * W)
            for (int i = 0; i < W; i++) {
                to[at + i] = widen(from[at + 2 * i]);
                to[at + W + i] = widen(from[at + 2 * i + 1]);
            }
    } else if (bf) {
        std::memcpy(out, q, dim * 2);
    } else {
        widen_row(q, kind, dim, reinterpret_cast<float*>(out));
    }
}

// Back from units to the order of `dim` values.
inline void in_order(const float* from, int dim, float* to) {
    for (int at = 0; at < dim; at += 2 * W)
        for (int i = 0; i < W; i++) {
            to[at + 2 * i] = from[at + i];
            to[at + 2 * i + 1] = from[at + W + i];
        }
}

struct Context { int64_t first, last, row; Slots slots; };  // what one row sees: [first, last)

// One token of one span, for KV heads [head, head_end). BF: the cache holds bfloat16; else floats
// are computed with.
template <bool BF> class Rows {
  public:
    Rows(const Layer& l, const Context& s, int64_t head, int64_t head_end, Scratch& scratch)
        : l(l), s(s), head(head), heads(int(head_end - head)), dim(int(l.dim)),
          group(int(l.heads / l.kv_heads)), units(dim / (BF ? 2 * W : W)),
          cache(bytes_of(l.cache_kind)) {
        const size_t queries = heads * group, copied = l.cache_kind == INT8 ? 2 * KT : 0, d = dim;
        scratch.begin(queries * (d * 8 + sizeof(State)) + (copied + 1) * d * 4 +
                      ROWS_MAX * KT * 4 + 1024);
        query = scratch.take<char>(queries * d * 4);
        sums_of = scratch.take<float>(queries * d);
        states = scratch.take<State>(queries);
        weights = scratch.take<float>(ROWS_MAX * KT);
        copies = scratch.take<float>(copied * d);
        ordered = scratch.take<float>(d);
    }

    void run() {
        for (int h = 0; h < heads * group; h++) {
            const char* q = place(l.query, s.row, l.query_token, head * group + h, l.query_head,
                                  bytes_of(l.query_kind));
            lay(q, l.query_kind, BF, dim, query + h * dim * 4);
            states[h] = State();
        }
        std::fill_n(sums_of, heads * group * dim, 0.f);
        for (int64_t first = s.first; first < s.last; first += KT) {
            n = int(std::min<int64_t>(KT, s.last - first));
            pad = (n + W - 1) / W * W;
            s.slots.read(first, n, pad, slots);
            fetch();
            for (int h = 0; h < heads; h++) add(h);
        }
        for (int h = 0; h < heads * group; h++) {
            const float* from = sums_of + h * dim;
            if (BF) in_order(from, dim, ordered);
            finish(l, BF ? ordered : from, states[h], s.row, head * group + h);
        }
    }

  private:
    // Where heads lie side by side in short rows, memory is read in its own order first: the
    // processor fetches ahead then, and the whole takes 0.7 of the time.
    void fetch() const {
        if (heads == 1 || dim * cache >= 256 || slots[n - 1] - slots[0] != n - 1) return;
        for (int t = 0; t < n; t++)
            touch(place(l.key, slots[t], l.key_token, head, l.key_head, cache),
                  int((heads - 1) * l.key_head + dim) * cache);
        for (int t = 0; t < n; t++)
            touch(place(l.value, slots[t], l.value_token, head, l.value_head, cache),
                  int((heads - 1) * l.value_head + dim) * cache);
    }

    // What the queries of KV head `h` get from the tile.
    void add(int h) {
        const char *k[KT], *v[KT];
        for (int t = 0; t < pad; t++) {
            k[t] = place(l.key, slots[t], l.key_token, head + h, l.key_head, cache);
            v[t] = place(l.value, slots[t], l.value_token, head + h, l.value_head, cache);
        }
        if (l.cache_kind == INT8)
            for (int t = 0; t < pad; t++) {
                k[t] = copy(k[t], t);
                v[t] = copy(v[t], KT + t);
            }
        float shrink[ROWS_MAX];
        for (int g = 0; g < group; g++) {
            float* w = weights + g * KT;
            State& state = states[h * group + g];
            scores_of<BF>(query + (h * group + g) * dim * 4, k, pad, units, w);
            shrink[g] = pad == n ? soften<false>(w, pad, 0, n, l.scale, l.softcap, state)
                                 : soften<true>(w, pad, 0, n, l.scale, l.softcap, state);
        }
        gather_rows<BF>(group, weights, v, n, units, shrink, sums_of + h * group * dim, dim);
    }

    const char* copy(const char* from, int place) {
        float* to = copies + int64_t(place) * dim;
        widen_row(from, l.cache_kind, dim, to);
        return reinterpret_cast<char*>(to);
    }

    const Layer& l;
    const Context& s;
    const int64_t head;
    const int heads, dim, group, units, cache;
    int n = 0, pad = 0;  // tokens of the tile, and up to whole vectors
    int64_t slots[KT];
    char* query;      // [queries], each as scores_of() wants it
    float *sums_of;   // [queries][dim]
    State* states;    // [queries]
    float *weights, *copies, *ordered;  // [group][KT], [2 KT][dim], [dim]
};

}  // namespace
