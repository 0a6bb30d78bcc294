// diagnose_batch.c: is the batch that an op sees the one that was planned? It knows what batches are, and no tensors.
#include "doctor/diagnose_walk.h"

#include "base/size.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// One array of a batch.
struct field {
    const char *name;
    const int32_t *planned, *found;
    size_t n;
    const int32_t *previous; // NULL: none, or of another length
};

struct batch *batch_copy(const struct batch *b) {
    size_t n_pages = (size_t)b->page_start[b->n_seqs];
    size_t n = 3 * b->n_tokens + 3 * b->n_seqs + 2 + n_pages + b->n_logit_rows;
    struct batch *copy = size_alloc(1, sizeof *copy + n * sizeof(int32_t));
    if (!copy) return NULL;
    int32_t *at = (int32_t *)(copy + 1);
    const struct {
        const int32_t *from;
        const int32_t **to;
        size_t n;
    } parts[] = {{b->token, &copy->token, b->n_tokens},
                 {b->position, &copy->position, b->n_tokens},
                 {b->seq, &copy->seq, b->n_tokens},
                 {b->seq_start, &copy->seq_start, b->n_seqs + 1},
                 {b->page_start, &copy->page_start, b->n_seqs + 1},
                 {b->pages, &copy->pages, n_pages},
                 {b->kv_len, &copy->kv_len, b->n_seqs},
                 {b->logit_rows, &copy->logit_rows, b->n_logit_rows}};
    *copy = *b;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (parts[i].n) memcpy(at, parts[i].from, parts[i].n * sizeof *at);
        *parts[i].to = at;
        at += parts[i].n;
    }
    return copy;
}

static bool all_shifted(const struct field *f, int32_t by) {
    for (size_t i = 0; i < f->n; i++)
        if (f->found[i] != f->planned[i] + by) return false;
    return true;
}

static bool is_permutation(const struct field *f) {
    for (size_t i = 0; i < f->n; i++) {
        size_t planned = 0, found = 0;
        for (size_t k = 0; k < f->n; k++) {
            planned += f->planned[k] == f->planned[i];
            found += f->found[k] == f->planned[i];
        }
        if (planned != found) return false;
    }
    return true;
}

// Names what is wrong with positions, in order of how much it would take to look so by chance.
static bool name_positions(const struct field *f, const struct batch *b, int layer, struct finding *out) {
    bool restarts = true, rows = true;
    for (size_t i = 0; i < f->n; i++) {
        restarts = restarts && f->found[i] == (int32_t)i - b->seq_start[b->seq[i]];
        rows = rows && f->found[i] == (int32_t)i;
    }
    double sure = f->n > 1 ? 0.95 : 0.8;
    if (layer > 0 && all_shifted(f, layer))
        finding_name(out, sure, "length advanced every layer", "layer %d sees every position %d further", layer, layer);
    else if (all_shifted(f, 1) || all_shifted(f, -1))
        finding_name(out, sure, "RoPE position off by one", "every position is %+d", f->found[0] - f->planned[0]);
    else if (restarts)
        finding_name(out, sure, "RoPE position restarts at each chunk", "positions count from the step's first token");
    else if (rows) finding_name(out, sure, "RoPE position is the row", "positions are indices in the batch");
    else return false;
    return true;
}

// How many fields of the whole batch are the last step's.
static bool is_stale(const struct field *f) {
    return f->previous && memcmp(f->found, f->previous, f->n * sizeof *f->found) == 0;
}

static void name_field(const struct field *f, const struct batch *b, int layer, struct finding *out) {
    if (strcmp(f->name, "position") == 0 && name_positions(f, b, layer, out)) return;
    bool lengths = strcmp(f->name, "kv_len") == 0, pages = strcmp(f->name, "pages") == 0;
    if (lengths && layer > 0 && f->n && f->found[0] > f->planned[0]) {
        finding_name(out, 0.95, "length advanced every layer", "layer %d sees %d positions too many", layer,
                     f->found[0] - f->planned[0]);
        return;
    }
    if (is_stale(f)) {
        finding_name(out, 0.95, "stale plan", "%s is the step's before", f->name);
        return;
    }
    if (lengths) {
        finding_name(out, 0.9, "last page's length wrong", "%d positions instead of %d", f->found[0], f->planned[0]);
        return;
    }
    if (pages && is_permutation(f)) finding_name(out, 0.95, "page order permuted", "the same pages, in another order");
    else if (pages) finding_name(out, 0.6, "wrong page", "a page that is not this sequence's");
    else if (strcmp(f->name, "logit_rows") == 0)
        finding_name(out, 0.95, "logits of the wrong row", "row %d instead of %d", f->found[0], f->planned[0]);
    else if (strcmp(f->name, "seq") == 0 || strcmp(f->name, "seq_start") == 0 || strcmp(f->name, "page_start") == 0)
        finding_name(out, 0.9, "neighbour's row", "tokens are counted to another sequence");
    else if (strcmp(f->name, "token") == 0)
        finding_name(out, 0.9, "wrong token", "id %d instead of %d", f->found[0], f->planned[0]);
}

// What `found` repeats within itself: one page in two places.
static bool shares_a_page(const struct batch *planned, const struct batch *b, struct finding *out) {
    for (size_t s = 0; s < b->n_seqs; s++)
        for (int32_t i = b->page_start[s]; i < b->page_start[s + 1]; i++)
            for (int32_t k = 0; k < i; k++) {
                if (b->pages[i] != b->pages[k] || planned->pages[i] == planned->pages[k]) continue;
                finding_name(out, 0.95, "page shared between sequences", "page %d stands in two lists", b->pages[i]);
                return true;
            }
    return false;
}

static bool compare(const struct batch *planned, const struct batch *b, const struct batch *previous, int layer,
                    struct finding *out) {
    bool same_shape = planned->n_tokens == b->n_tokens && planned->n_seqs == b->n_seqs;
    if (!same_shape || planned->n_logit_rows != b->n_logit_rows) {
        finding_place(out, "batch", layer, "batch = the plan");
        fault_say(&out->fault, "batch: %zu tokens of %zu sequences, %zu rows of logits; planned were %zu, %zu, %zu",
                  b->n_tokens, b->n_seqs, b->n_logit_rows, planned->n_tokens, planned->n_seqs, planned->n_logit_rows);
        if (previous && previous->n_tokens == b->n_tokens)
            finding_name(out, 0.8, "stale plan", "it has the shape of the step before");
        return false;
    }
    bool aligned = previous && previous->n_tokens == b->n_tokens && previous->n_seqs == b->n_seqs;
    const struct batch *p = planned, *old = aligned ? previous : NULL;
    const struct field fields[] = {
        {"seq_start", p->seq_start, b->seq_start, p->n_seqs + 1, NULL},
        {"seq", p->seq, b->seq, p->n_tokens, NULL},
        {"position", p->position, b->position, p->n_tokens, old ? old->position : NULL},
        {"token", p->token, b->token, p->n_tokens, old ? old->token : NULL},
        {"kv_len", p->kv_len, b->kv_len, p->n_seqs, old ? old->kv_len : NULL},
        {"page_start", p->page_start, b->page_start, p->n_seqs + 1, NULL},
        {"pages", p->pages, b->pages, (size_t)p->page_start[p->n_seqs], NULL},
        {"logit_rows", p->logit_rows, b->logit_rows, p->n_logit_rows, NULL},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        const struct field *f = &fields[i];
        size_t at = 0;
        while (at < f->n && f->planned[at] == f->found[at]) at++;
        if (at == f->n) continue;
        finding_place(out, "batch", layer, "batch = the plan");
        snprintf(out->fault.tensor, sizeof out->fault.tensor, "batch.%s", f->name);
        if (f->n == b->n_tokens && f->planned != p->pages) out->fault.position = p->position[at];
        out->fault.expected = f->planned[at];
        out->fault.found = f->found[at];
        fault_say(&out->fault, "batch: %s[%zu] is %d, planned was %d", f->name, at, f->found[at], f->planned[at]);
        if (strcmp(f->name, "pages") != 0 || !shares_a_page(planned, b, out)) name_field(f, b, layer, out);
        return false;
    }
    return true;
}

// ---- Without a plan: what any right batch satisfies ----------------------------------------------------------------

static bool wrong(struct finding *out, int layer, const char *array, int position, int expected, int found,
                  const char *what) {
    finding_place(out, "batch", layer, "batch continues its sequences");
    snprintf(out->fault.tensor, sizeof out->fault.tensor, "batch.%s", array);
    out->fault.position = position;
    out->fault.expected = expected;
    out->fault.found = found;
    fault_say(&out->fault, "batch: %s is %d, expected was %d: %s", array, found, expected, what);
    return false;
}

// The sequence whose ids these tokens are, `shift` positions further than the batch says.
static const struct walk_sequence *match(const struct batch_view *v, const struct batch *b, size_t s, int32_t shift) {
    for (size_t i = 0; i < v->n_sequences; i++) {
        bool fits = true;
        for (int32_t t = b->seq_start[s]; fits && t < b->seq_start[s + 1]; t++) {
            int64_t at = (int64_t)b->position[t] + shift;
            fits = at >= 0 && at < (int64_t)v->sequences[i].n && v->sequences[i].ids[at] == b->token[t];
        }
        if (fits) return &v->sequences[i];
    }
    return NULL;
}

// The tokens belong to no sequence at these positions: where do they?
static bool misplaced(const struct batch_view *v, const struct batch *b, size_t s, struct finding *out) {
    int32_t first = b->seq_start[s], position = b->position[first];
    // The step before was right: a plan that is wrong from the start would have been seen in it.
    const struct batch *old = v->previous;
    if (old && old->n_tokens == b->n_tokens && old->n_seqs == b->n_seqs &&
        memcmp(old->position, b->position, b->n_tokens * sizeof *b->position) == 0) {
        wrong(out, v->layer, "position", position, -1, position, "the positions are the step's before");
        finding_name(out, 0.85, "stale plan", "positions of the step before");
        return false;
    }
    for (int32_t shift = 1; shift < 512; shift++) {
        for (int32_t by = shift; by >= -shift; by -= 2 * shift) {
            if (!match(v, b, s, by)) continue;
            wrong(out, v->layer, "position", position + by, position + by, position, "tokens and positions do not fit");
            if (shift == 1) finding_name(out, 0.95, "RoPE position off by one", "every position is %+d", -by);
            else if (position == 0)
                finding_name(out, 0.95, "RoPE position restarts at each chunk",
                             "positions count from the step's start");
            else finding_name(out, 0.8, "wrong position", "every position is %+d", -by);
            return false;
        }
    }
    wrong(out, v->layer, "token", position, -1, b->token[first], "no sequence holds these tokens");
    for (size_t i = 0; i < v->n_sequences; i++) {
        if (v->sequences[i].n != (size_t)position) continue;
        finding_name(out, 0.7, "stale KV kept",
                     "position %d lies behind the end of a sequence: too much counts as computed", position);
        break;
    }
    return false;
}

static bool check_sequence(const struct batch_view *v, const struct batch *b, size_t s, const struct walk_sequence **of,
                           struct finding *out) {
    int32_t first = b->seq_start[s], last = b->seq_start[s + 1] - 1;
    int32_t n_pages = b->page_start[s + 1] - b->page_start[s];
    if (last < first) return wrong(out, v->layer, "seq_start", -1, first + 1, last + 1, "a sequence without tokens");
    for (int32_t t = first; t <= last; t++) {
        if (b->seq[t] != (int32_t)s) {
            wrong(out, v->layer, "seq", b->position[t], (int)s, b->seq[t], "a token of another sequence");
            finding_name(out, 0.9, "neighbour's row", "token %d is counted to sequence %d", t, b->seq[t]);
            return false;
        }
        if (b->position[t] != b->position[first] + t - first)
            return wrong(out, v->layer, "position", b->position[t], b->position[first] + t - first, b->position[t],
                         "positions are not consecutive");
    }
    *of = match(v, b, s, 0);
    if (!*of) return misplaced(v, b, s, out);
    int32_t length = b->position[last] + 1;
    if (b->kv_len[s] != length) {
        wrong(out, v->layer, "kv_len", length - 1, length, b->kv_len[s], "positions in the KV after this step");
        finding_name(out, 0.9, "last page's length wrong", "%d positions instead of %d", b->kv_len[s], length);
        return false;
    }
    if (n_pages * KV_PAGE_TOKENS < length)
        return wrong(out, v->layer, "page_start", length - 1, (length + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS, n_pages,
                     "pages of the sequence");
    for (int32_t i = b->page_start[s]; i < b->page_start[s + 1]; i++)
        if (b->pages[i] < 0 || (size_t)b->pages[i] >= v->n_pages)
            return wrong(out, v->layer, "pages", -1, 0, b->pages[i], "a page that does not exist");
    return true;
}

// Two sequences may share a page only where all tokens up to its end are the same.
static bool check_sharing(const struct batch_view *v, const struct batch *b, const struct walk_sequence **of,
                          struct finding *out) {
    for (size_t s = 0; s < b->n_seqs; s++) {
        for (size_t other = 0; other < s; other++) {
            for (int32_t i = 0; i < b->page_start[s + 1] - b->page_start[s]; i++) {
                for (int32_t k = 0; k < b->page_start[other + 1] - b->page_start[other]; k++) {
                    int32_t page = b->pages[b->page_start[s] + i];
                    size_t end = (size_t)(i + 1) * KV_PAGE_TOKENS;
                    if (page != b->pages[b->page_start[other] + k]) continue;
                    bool same = i == k && of[s]->n >= end && of[other]->n >= end &&
                                memcmp(of[s]->ids, of[other]->ids, end * sizeof(int32_t)) == 0;
                    if (same) continue;
                    wrong(out, v->layer, "pages", i * KV_PAGE_TOKENS, -1, page, "one page for two sequences");
                    finding_name(out, 0.95, "page shared between sequences", "page %d belongs to two sequences", page);
                    return false;
                }
            }
        }
    }
    return true;
}

bool batch_check(const struct batch_view *v, const struct batch *b, const struct walk_sequence **of_seq,
                 struct finding *out) {
    if (v->planned) return compare(v->planned, b, v->previous, v->layer, out);
    for (size_t s = 0; s < b->n_seqs; s++)
        if (!check_sequence(v, b, s, &of_seq[s], out)) return false;
    for (size_t r = 0; r < b->n_logit_rows; r++) {
        int32_t row = b->logit_rows[r];
        bool last = false;
        for (size_t s = 0; s < b->n_seqs; s++) last = last || row == b->seq_start[s + 1] - 1;
        if (last) continue;
        wrong(out, v->layer, "logit_rows", -1, b->seq_start[1] - 1, row,
              "the logits of a sequence's last token are due");
        finding_name(out, 0.9, "logits of the wrong row", "row %d ends no sequence", row);
        return false;
    }
    return check_sharing(v, b, of_seq, out);
}
