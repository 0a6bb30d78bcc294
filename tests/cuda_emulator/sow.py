#!/usr/bin/env python3
"""Copies a CUDA source with the mistakes sown in that the emulator must find: each is off until its number is in
sown_mistake. A place that is not found exactly once is an error, so that the table follows the sources.

  sow.py SOURCE OUT     the patched source
  sow.py --list OUT     a C array of their names
"""
import re
import sys

# name, what finds it (PAGES: chunks and pages; SPLIT: contexts of two chunks;
# TILES: many tokens; PAIRS: the same on many SMs; LAYERS: all layers in one kernel; DEEP: with many chunks; HEADS: K and V stored by their product; CHAIN: steps
# of one token behind each other), then file, before, after; M is its number.
MISTAKES = [
    ("no barrier before a product's inputs are read", "PAGES",
     ("small.cuh", "    __syncthreads();\n    barrier_wait(&arrived, 0);",
      "    if (!M) __syncthreads();\n    barrier_wait(&arrived, 0);")),
    ("no barrier before a tile's stage is overwritten", "TILES",
     ("tiles.cuh", "__syncthreads(); // the stage has been read", "if (!M) __syncthreads();")),
    ("no barrier between pages and their combination", "PAGES",
     ("attention.cu", "__syncthreads(); // p and V are there", "if (!M) __syncthreads(); //")),
    ("V pages overwritten while others read them", "SPLIT",
     ("attention.cu", "__syncthreads(); // they have been read", "if (!M) __syncthreads();")),
    ("this step's K and V read from their page", "PAGES",
     ("attention.cu", "index == last_page ? slot : -1,", "index == last_page && !M ? slot : -1,")),
    ("a page's unused slots not cleared", "PAGES",
     ("attention.cu", "special = n < ATTN_BLOCK || slot >= 0;", "special = (n < ATTN_BLOCK || slot >= 0) && !M;")),
    ("V not waited for", "PAGES",
     ("attention.cu", "barrier_wait(&sh->v_arrived[warp], parity);", "if (!M) barrier_wait(&sh->v_arrived[warp], parity);")),
    ("a page's p taken for the chunk's", "PAGES",
     ("attention.cu", "float factor = exp2_fast(", "float factor = M ? 1.0f : exp2_fast(")),
    ("a split context's first chunk taken for all", "SPLIT",
     ("attention.cu", "const float *part = parts + k * size;", "const float *part = parts + (M ? 0 : k) * size;")),
    ("arrivals not set back to zero", "SPLIT",
     ("attention.cu", "if (thread == 0) p.arrivals[tile] = 0;", "if (thread == 0 && !M) p.arrivals[tile] = 0;")),
    ("a context's length recorded with the graph", "PAGES",
     ("attention.cu", "int limit = __ldcg(p.b.position + end - 1) + 1,",
      "int limit = M && FUSED ? p.max_chunks : __ldcg(p.b.position + end - 1) + 1,"),
     ("attention.cu", "    p.max_chunks = (int)most_chunks(a->batch);",
      "    p.max_chunks = M ? a->batch->host->position[0] + 1 : (int)most_chunks(a->batch);")),
    ("inputs read before the kernel before has ended", "PAGES",
     ("products.cuh", "    dependency_wait();\n    const float *x = input_row(p, 0);",
      "    if (!M) dependency_wait();\n    const float *x = input_row(p, 0);"),
     ("products.cuh", "    float r = 1.0f;\n    if (NORM) {\n        float s = 0; // as norm_partial",
      "    if (M) dependency_wait();\n    float r = 1.0f;\n    if (NORM) {\n        float s = 0;")),
    ("rows of padding written", "PAGES",
     ("products.cuh", "if (row >= p.n_out[segment] || token >= p.n_tokens) return;",
      "if (row >= p.n_out[segment] || (token >= p.n_tokens && !M)) return;")),
    ("pages read in their order in memory", "PAGES",
     ("attention.cu", "page = __ldcg(pages + chunk * CHUNK_PAGES + warp);",
      "page = M ? chunk * CHUNK_PAGES + warp : __ldcg(pages + chunk * CHUNK_PAGES + warp);")),
    ("a slice's tail of columns not zero", "PAGES",
     ("tiles.cuh", "if (real && k < p.n_in) v =", "if (real && (k < p.n_in || M)) v =")),
    ("K and V of the last layer read before they are stored", "PAGES",
     ("pointwise.cu", "store_by_warps(ctx, a, 0);\n    s->has_new_kv = true;",
      "store_by_warps(ctx, a, 0);\n    s->has_new_kv = !M;")),
    ("a recorded sequence for another batch", "PAGES",
     ("device.c", "if (s->recordings[i].key != key) continue;", "if (s->recordings[i].key != key && !M) continue;")),
    ("a wide tile's pages overwritten while they are read", "SPLIT",
     ("wide.cu", "__syncthreads(); // the group has been read", "if (!M) __syncthreads();")),
    ("a wide tile's unused slots not cleared", "PAGES",
     ("wide.cu", "if (n < ATTN_BLOCK) wide_values", "if (n < ATTN_BLOCK && !M) wide_values")),
    ("a wide tile's sums left behind by their unit", "SPLIT",
     ("attention.cuh", "l[e] *= a[ROWS_ACROSS ? ", "l[e] *= M && !ROWS_ACROSS ? 1.0f : a[ROWS_ACROSS ? ")),
    ("a page overwritten while groups multiply it", "SPLIT",
     ("group_attention.cu", "if (number >= RING_PAIRS) barrier_wait(", "if (number >= RING_PAIRS && !M) barrier_wait(")),
    ("a page multiplied before it has come", "PAGES",
     ("group_attention.cu", "    barrier_wait(&sh->ready[kind]", "    if (!M) barrier_wait(&sh->ready[kind]")),
    ("a prompt's sums left in units that have been raised", "SPLIT",
     ("group_attention.cu", "if (sums.is_raised) sums.change_units();", "if (sums.is_raised && !M) sums.change_units();"),
     # On a GPU few scores are so high: without headroom more are.
     ("group_attention.cu", "NO_UNIT : m + UNIT_RANGE);", "NO_UNIT : m + (M ? 1 : UNIT_RANGE));")),
    ("a tile told where another is still read", "SPLIT",
     ("group_attention.cu", "if (i >= PLACES) barrier_wait(", "if (i >= PLACES && !M) barrier_wait(")),
    ("tiles not counted from zero again", "PAGES",
     ("group_attention.cu", "*p.arrivals = 0;", "*p.arrivals = M ? 1 : 0;")),
    ("a multiplied page's unused slots not cleared", "PAGES",
     ("group_attention.cu", "if (lane < n) return;", "if (lane < n || M) return;")),
    ("prompts' tiles counted from their second token", "PAGES",
     ("wide.cuh", "start = b.seq_start[0];", "start = b.seq_start[0] + (M ? 1 : 0);")),
    ("sequences of one token packed as a step of their own", "PAGES",
     ("attention.cu", "        p.packed = whole->packed;\n", "        if (!M) p.packed = whole->packed;\n")),
    ("sequences of one token forgotten beside prompts", "PAGES",
     ("attention.cu", "    if (n_single) attend_singles(", "    if (n_single && !M) attend_singles(")),
    ("a stage of a group overwritten while it is read", "TILES",
     ("group_kernel.cuh", "            uint64_t *full = &r.tokens_full[at.stage];\n            if (at.round > 0)",
      "            uint64_t *full = &r.tokens_full[at.stage];\n            if (at.round > 0 && !M)")),
    ("a stage of weights and tokens overwritten while it is read", "TILES",
     ("group_kernel.cuh", "                if (at.round > 0) barrier_wait(", "                if (at.round > 0 && !M) barrier_wait(")),
    ("a group's weights overwritten while they are read", "TILES",
     ("group_kernel.cuh", "if (at.round > 0) barrier_wait(&r.weights_empty[", "if (at.round > 0 && !M) barrier_wait(&r.weights_empty[")),
    ("a group's weights given back before what was loaded is used", "TILES",
     ("groups.cu", "    s.tokens = group_operand(r.tokens",
      "    __syncwarp();\n    if (M) barrier_arrive(&r.weights_empty[at.weights.stage]);\n"
      "    s.tokens = group_operand(r.tokens"),
     ("groups.cu", "    barrier_arrive(&r.weights_empty[used", "    if (!M) barrier_arrive(&r.weights_empty[used")),
    ("a group's sums read before they are there", "PAGES",
     ("groups.cu", "    group_wait<P>(d);", "    if (!M || P > 0) group_wait<P>(d);")),
    ("a group's rows of padding written", "PAGES",
     ("results.cuh", "if (2 * i < limit) to[0]", "if (2 * i < limit || M) to[0]"),
     ("group_kernel.cuh", "if (token + lane / 4 + i * 8 >= p.n_tokens) continue;", "if (token + lane / 4 + i * 8 >= p.n_tokens && !M) continue;")),
    ("a head's keys written over while they are read", "HEADS",
     ("heads.cuh", "        x.load(rows.take[0], rows.take[1]);\n        sync_some(HEAD_BARRIER, S::WARPS * 32);\n",
      "        for (int i = 0; M && i < 8 * warp; i++) __syncwarp();\n        x.load(rows.take[0], rows.take[1]);\n"
      "        if (!M) sync_some(HEAD_BARRIER, S::WARPS * 32);\n")),
    ("values of a token stored in the place of another", "HEADS",
     ("heads.cuh", "half * 16 + lane / 2", "(M ? 0 : half * 16) + lane / 2")),
    ("k and v of single tokens not written beside prompts", "HEADS",
     ("heads.cuh", "w.token < h.n_single)", "(w.token < h.n_single && !M))")),
    ("a group's tail of columns not zero", "PAGES",
     ("groups.cu", "put_packed(packed, i, k, token_units, load4(x, k, p.n_in));", "put_packed(packed, i, k, token_units, load4(x, k, M ? p.columns : p.n_in));")),
    ("a cluster's sums added before they are there", "PAGES",
     ("clusters.cuh", "    barrier_wait(summed, 0);", "    if (!M) barrier_wait(summed, 0);")),
    ("a cluster's inputs multiplied before they are there", "PAGES",
     ("clusters.cuh", "    __syncthreads();\n    barrier_wait(arrived, 0);",
      "    if (!M) __syncthreads();\n    barrier_wait(arrived, 0);")),
    ("a product's parts not added before another kernel", "PAGES",
     ("common.cuh", "    cuda_add_parts(s);\n    s->packed", "    if (!M) cuda_add_parts(s);\n    s->packed")),
    ("a product's parts read before they are there", "PAGES",
     ("parts.cu", "    barrier_wait(&arrived, 0);\n    float s = 0;", "    if (!M) barrier_wait(&arrived, 0);\n    float s = 0;")),
    ("a slice apart multiplied with the first one's tokens", "PAGES",
     ("group_kernel.cuh", "(size_t)w.first * step;", "(size_t)(M ? 0 : w.first) * step;")),
    ("a shared tile's sums taken before they are there", "PAIRS",
     ("groups.cu", "            barrier_wait(r.inbox, 0);", "            if (!M) barrier_wait(r.inbox, 0);")),
    ("a wide tile counted from the first token of all", "PAGES",
     ("wide.cuh", "            token = start + tile * size;", "            token = (M ? 0 : start) + tile * size;")),
    ("no barrier before slices of q, k and v are added", "LAYERS",
     ("persistent.cu", "            sync_some(1, WORKERS);\n        }\n        int n = mlp",
      "            if (!M) sync_some(1, WORKERS);\n        }\n        int n = mlp")),
    ("the board's other half not emptied", "LAYERS",
     ("persistent.cu", "if (k * 8 + lane / 4 < n_rows) row[other_half +", "if (k * 8 + lane / 4 < n_rows && !M) row[other_half +")),
    ("slots of the ring filled again while they are read", "LAYERS",
     ("persistent.cu", "if (wrapped) wait_for(p, &sh->empty[at.slot], at.parity() ^ 1);",
      "if (wrapped && !M) wait_for(p, &sh->empty[at.slot], at.parity() ^ 1);")),
    ("held slots of the ring given back before they are read", "LAYERS",
     ("persistent.cu", "    hold(h, u, lane);\n    keep(kept, at, slots_of_two(n));",
      "    if (M) pass(sh, at, slots_of_two(n), lane);\n    for (int i = 0; M && i < 500; i++) __syncwarp();\n"
      "    hold(h, u, lane);\n    if (!M) keep(kept, at, slots_of_two(n));")),
    ("a slot of the ring that no fetcher fills", "LAYERS",
     ("persistent.cu", "others = has ? FETCHERS - 1 : others - 1;", "others = has ? FETCHERS - !M : others - 1;")),
    ("this token's k not in the page in shared memory", "LAYERS",
     ("persistent_attention.cuh", "to[i * KV_STEP] = memory[i * KV_STEP] =", "(M ? memory : to)[i * KV_STEP] = memory[i * KV_STEP] =")),
    ("a chunk's pages taken before all are weighed", "LAYERS",
     ("persistent_attention.cuh", "    sync_some(1, WORKERS); // weighed", "    if (!M) sync_some(1, WORKERS); // weighed")),
    ("a chunk's pages given back before they are read", "DEEP",
     ("persistent_attention.cuh", " // weighed\n",
      "\n    for (int i = 0; M && i + 1 < n; i++) give_back(sh, at.ahead((unsigned)i), lane);\n"),
     ("persistent_attention.cuh", "        give_back(sh, at, lane);", "        if (!M) give_back(sh, at, lane);")),
    ("what was noted of the layer before taken for this one's", "DEEP",
     ("persistent_attention.cuh", "if (v >> 32 == number) return", "if (M ? v >> 32 != 0xFFFFFFFFu : v >> 32 == number) return"),
     ("persistent_attention.cuh", "complete &= v[i] >> 32 == number;", "complete &= M || v[i] >> 32 == number;")),
    ("a step's pages taken in their order in memory", "DEEP",
     ("persistent.cu", ": pages.id[i]; };", ": M ? i : pages.id[i]; };")),
    ("a step's arrays left where the host has them", "CHAIN",
     ("persistent.cu", "p.open.arrays[i] = __ldcg(p.open.staged + i);", "if (!M) p.open.arrays[i] = __ldcg(p.open.staged + i);")),
    ("the best of the step before the last not forgotten", "CHAIN",
     ("persistent.cu", "*p.best = 0;", "*p.best = M ? *p.best : 0;")),
    ("a choice made of parts that are not there", "CHAIN",
     ("choice.cuh", "__shfl_sync(~0u, before, 0) == CHOICE_PARTS - 1;", "__shfl_sync(~0u, before, 0) == (M ? 3 : CHOICE_PARTS - 1);")),
    ("a choice beside layers forgotten where no layers follow", "CHAIN",
     ("device.c", "if (s->choice.mark.flag == s->flags + number) cuda_choose_now(s);", "if (s->choice.mark.flag == s->flags + number && !M) cuda_choose_now(s);")),
    ("this step's K and V of a stream read from their page", "COMPANY",
     ("stream.cu", "int slot = n <= ATTN_BLOCK ? n - 1 : -1;", "int slot = n <= ATTN_BLOCK && !M ? n - 1 : -1;")),
    ("V pages asked for where K pages have not been read", "COMPANY",
     ("attention.cu", "    scores<KV, tall>(s, &sh->q,",
      "    if (M && asks(lane) && sh->shares(warp)) ask_for(sh, p, true, kv_head, page, warp, lane);\n    scores<KV, tall>(s, &sh->q,"),
     ("attention.cu", "if (asks(lane) && sh->shares(warp)) ask_for(",
      "if (M && asks(lane) && sh->shares(warp)) (void)0;\n    else if (asks(lane) && sh->shares(warp)) ask_for(")),
    ("a stream's chunks counted as one", "COMPANY",
     ("stream.cu", "count_arrival(arrived, (unsigned)(last - first))", "count_arrival(arrived, M ? 1 : (unsigned)(last - first))")),
    ("attention's results packed for another token", "COMPANY",
     ("attention.cuh", "packed_at(token, column,", "packed_at(M ? token ^ 1 : token, column,")),
    ("a stream's pages waited for in the wrong phase", "COMPANY",
     ("stream.cu", "stage = 0, parity ^= 1;", "stage = 0, parity ^= !M;")),
    ("the first of a stream's pages' numbers taken for all", "COMPANY",
     ("stream.cu", "__shfl_sync(~0u, number, item / 2)", "__shfl_sync(~0u, number, M ? 0 : item / 2)")),
    ("a stream's unused slots not cleared", "COMPANY",
     ("columns.cuh", "if (slot + 16 * s >= n) instead", "if (slot + 16 * s >= n && !M) instead")),
    ("a stream's values left behind by their unit", "COMPANY",
     ("attention.cuh", "of[i][e] *= a[ROWS_ACROSS ? ", "of[i][e] *= M && ROWS_ACROSS ? 1.0f : a[ROWS_ACROSS ? ")),
]


def sow(path):
    with open(path) as f:
        text = f.read()
    for number, (name, _, *places) in enumerate(MISTAKES, 1):
        for file, before, after in places:
            if not path.endswith("/" + file):
                continue
            if text.count(before) != 1:
                sys.exit(f"sow.py: {path}: {name}: {text.count(before)} places read {before!r}, 1 is expected")
            text = text.replace(before, re.sub(r"\bM\b", "MISTAKE(%d)" % number, after))
    return '#include "mistake.h"\n#line 1 "%s"\n%s' % (path, text)


def listing():
    lines = ["static const struct mistake mistakes[] = {"]
    lines += ['    {"%s", %s},' % (name, where) for name, where, *_ in MISTAKES]
    return "\n".join(lines) + "\n};\n"


def main():
    source, out = sys.argv[1:]
    text = listing() if source == "--list" else sow(source)
    with open(out, "w") as f:
        f.write(text)


main()
