// What is asked, where it lies in memory, and the softmax that both ways of computing it share.

#pragma once

#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

enum Kind : int32_t { F32 = 0, BF16 = 1, INT8 = 2 };  // INT8: then its scale, a bfloat16

}  // namespace

extern "C" {

// `count` rows of the packed batch, from row `at` on, at positions `start`, ...; their blocks are
// `tables[table_at]`, ... `seen` > 0: each row sees the first `seen` positions, whatever its own.
struct Span {
    int64_t start, count, at, table_at, seen;
};

// One batch; the same for all layers of a kind.
struct Batch {
    int64_t spans, block_size, window;  // window 0: none
    const Span* span;
    const int32_t* tables;
    int64_t threads;
};

// One layer's call. Strides in elements of their tensor; a head's values are contiguous.
struct Layer {
    const void *query, *key, *value;
    void* out;
    float* lse;  // [tokens, heads], or null: logarithm of each row's sum of exponentials
    int64_t heads, kv_heads, dim;
    int64_t query_token, query_head, key_token, key_head, value_token, value_head, out_token;
    int32_t query_kind, cache_kind;
    float scale, softcap;  // softcap 0: none
};
}

namespace {

// What a row of a span sees, [low, high).
struct Sight { int64_t low, high; };
inline Sight sight(const Batch& b, int64_t span, int64_t token) {
    const Span& s = b.span[span];
    if (s.seen) return {0, s.seen};
    const int64_t at = s.start + token;
    return {b.window ? std::max<int64_t>(0, at - b.window + 1) : 0, at + 1};
}

struct Scratch {  // one thread's, kept between calls
    std::vector<char> bytes;
    char* at = nullptr;
    void begin(size_t need) {
        if (bytes.size() < need + 64) bytes.resize(need + 64);
        const uintptr_t first = reinterpret_cast<uintptr_t>(bytes.data());
        at = reinterpret_cast<char*>((first + 63) & ~uintptr_t(63));
    }
    template <class T> T* take(size_t n) {
        T* p = reinterpret_cast<T*>(at);
        at += (n * sizeof(T) + 63) & ~size_t(63);
        return p;
    }
};

inline void touch(const char* p, int bytes) {
    for (int at = 0; at < bytes; at += 64) asm volatile("" ::"r"(p[at]));
}

struct Slots {  // of one span's positions
    const int32_t* table; int64_t size;
    // slots of positions [first, first + n); those after, up to `pad`, repeat the last
    void read(int64_t first, int n, int pad, int64_t* out) const {
        int64_t block = first / size, in = first % size;
        for (int i = 0; i < n; block++, in = 0)
            for (int64_t base = table[block] * size; in < size && i < n; in++) out[i++] = base + in;
        for (int i = n; i < pad; i++) out[i] = out[n - 1];
    }
};

inline const char* place(const void* p, int64_t token, int64_t token_stride, int64_t head,
                         int64_t head_stride, int bytes) {
    return static_cast<const char*>(p) + (token * token_stride + head * head_stride) * bytes;
}
inline int bytes_of(int32_t kind) { return kind == F32 ? 4 : kind == BF16 ? 2 : 1; }

// One vector of a token and head as floats.
void widen_row(const char* p, int32_t kind, int dim, float* out) {
    if (kind == F32) { std::memcpy(out, p, dim * 4); return; }
    if (kind == BF16) {
        const bf16* q = reinterpret_cast<const bf16*>(p);
        for (int d = 0; d < dim; d++) out[d] = widen(q[d]);
        return;
    }
    const int8_t* q = reinterpret_cast<const int8_t*>(p);
    bf16 s; std::memcpy(&s, p + dim, 2);
    const float scale = widen(s);
    for (int d = 0; d < dim; d++) out[d] = q[d] * scale;
}

inline void put(const float* from, float factor, int dim, char* to, int32_t kind) {
    if (kind == F32) {
        float* out = reinterpret_cast<float*>(to);
        for (int d = 0; d < dim; d++) out[d] = from[d] * factor;
    } else {
        bf16* out = reinterpret_cast<bf16*>(to);
        for (int d = 0; d < dim; d++) out[d] = narrow(from[d] * factor);
    }
}

struct State {  // of a row's softmax so far, in powers of two; `total` by lanes
    vf total = {};
    float top = NEVER;
};

// Scores [n] become weights in place, and rows before them shrink by the factor returned. `n` is a
// multiple of W; only [low, high) is seen.
template <bool PART>
inline float soften(float* s, int n, int low, int high, float scale, float softcap, State& state) {
    vf best = all(NEVER);
    vi lane; for (int i = 0; i < W; i++) lane[i] = i;
    const vf factor = all(scale * LOG2E);
    for (int i = 0; i < n; i += W) {
        vf x = load<vf>(s + i);
        if (softcap != 0.f) {  // c tanh(x / c) = c (1 - 2 / (1 + exp(2 x / c)))
            vf y = x * (scale / softcap);
            vf e = exp2(-2.f * LOG2E * (y < 0.f ? -y : y));
            vf t = (1.f - e) / (1.f + e);
            x = (y < 0.f ? -t : t) * (softcap * LOG2E);
        } else {
            x = x * factor;
        }
        if (PART) { vi at = lane + i; x = (at >= low) & (at < high) ? x : all(NEVER); }
        store(s + i, x);
        best = max(best, x);
    }
    const float now = std::max(state.top, top(best));
    vf total = vf{};
    for (int i = 0; i < n; i += W) {
        vf x = load<vf>(s + i);
        vf p = exp2(x - now);
        if (PART) { vi at = lane + i; p = (at >= low) & (at < high) ? p : vf{}; }
        store(s + i, p);
        total += p;
    }
    const float shrink = state.top == now ? 1.f : std::exp2(state.top - now);
    state.top = now;
    state.total = state.total * shrink + total;
    return shrink;
}

// A row's sums over its weights, to its place in `out`.
inline void finish(const Layer& l, const float* sums, const State& state, int64_t row,
                   int64_t head) {
    const float total = sum(state.total);
    const int64_t at = (row * l.out_token + head * l.dim) * bytes_of(l.query_kind);
    put(sums, 1.f / total, int(l.dim), static_cast<char*>(l.out) + at, l.query_kind);
    if (l.lse) l.lse[row * l.heads + head] = state.top * LN2 + std::log(total);
}

}  // namespace
