// Ragged attention over paged KV on a CPU. Knows pointers, strides, block tables and positions;
// must not know layers, requests or torch. Whoever calls has checked every bound
// (engine.native.kernel).
//
//   rows.h    one token of a sequence: its block table is read directly, K and V once for all query
//             heads that share them; memory is the limit
//   tiles.h   many: Q block x K tile in registers, K and V packed once a tile and KV head
//
// What a row gets does not depend on what else is in the batch.

#include "rows.h"
#include "tiles.h"

namespace {

// What one thread does at a time: a Q block, or the single token of a span for some KV heads.
struct Item { Block block; bool single; int64_t head_end; };

std::vector<Item> items_of(const Batch& b, const Layer& l) {
    const int64_t group = l.heads / l.kv_heads;
    std::vector<Item> items;
    for (int64_t i = 0; i < b.spans; i++) {
        if (b.span[i].count == 1 && group <= ROWS_MAX) {
            const int64_t parts = b.threads > b.spans ? l.kv_heads : 1, each = l.kv_heads / parts;
            for (int64_t h = 0; h < l.kv_heads; h += each)
                items.push_back({{i, h, 0, 1}, true, h + each});
            continue;
        }
        const int64_t total = b.span[i].count * group;
        for (int64_t h = 0; h < l.kv_heads; h++)
            for (int64_t r = 0; r < total; r += QB)
                items.push_back({{i, h, r, std::min<int64_t>(r + QB, total)}, false, h + 1});
    }
    return items;
}

void run(const Batch& b, const Layer& l, const Item& one) {
    static thread_local Scratch scratch;
    const int64_t span = one.block.span;
    if (one.single) {
        const Sight s = sight(b, span, 0);
        const Slots slots{b.tables + b.span[span].table_at, b.block_size};
        const Context of{s.low, s.high, b.span[span].at, slots};
        if (l.cache_kind == BF16) Rows<true>(l, of, one.block.head, one.head_end, scratch).run();
        else Rows<false>(l, of, one.block.head, one.head_end, scratch).run();
    } else if (DOTS && l.query_kind == BF16) {
        Tiles<true>(b, l, one.block, scratch).run();
    } else {
        Tiles<false>(b, l, one.block, scratch).run();
    }
}

}  // namespace

extern "C" {

// Bytes of these, so that a caller whose idea of them is another one finds out.
int64_t kvasir_sizes() { return int64_t(sizeof(Batch)) << 32 | int64_t(sizeof(Layer)); }

// 0, or 1 where memory ran out.
int32_t kvasir_attend(const Batch* batch, const Layer* layer) {
    try {
        const std::vector<Item> items = items_of(*batch, *layer);
        const int64_t count = int64_t(items.size());
        if (batch->threads < 2 || count < 2) {
            for (const Item& one : items) run(*batch, *layer, one);
            return 0;
        }
        int32_t failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(int(batch->threads))
        for (int64_t i = 0; i < count; i++) {
            try {
                run(*batch, *layer, items[i]);
            } catch (...) {
#pragma omp atomic write
                failed = 1;
            }
        }
        return failed;
    } catch (...) {
        return 1;
    }
}
}
