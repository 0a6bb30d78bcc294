// sampler.c: see sampler.h.
#include "engine/sampler.h"

#include "base/size.h"
#include "ops/sampling.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    LANES = 16, // logits looked at together
    FEW = 256,  // so many best ones are found with a heap
};

bool sampler_create(struct sampler *s, size_t n_vocab, struct error *err) {
    *s = (struct sampler){.n_vocab = n_vocab};
    s->logits = size_alloc(n_vocab, sizeof *s->logits);
    s->candidates = size_alloc(n_vocab, sizeof *s->candidates);
    s->count = size_alloc_zero(n_vocab, sizeof *s->count);
    if (s->logits && s->candidates && s->count) return true;
    sampler_free(s);
    return error_set(err, "out of memory for sampling over %zu tokens", n_vocab);
}

void sampler_free(struct sampler *s) {
    free(s->logits);
    free(s->candidates);
    free(s->count);
    *s = (struct sampler){0};
}

size_t sampler_bytes(size_t n_vocab) {
    return n_vocab * (sizeof(float) + sizeof(struct candidate) + sizeof(uint32_t));
}

bool sampling_check(const tandem_sampling *p, size_t n_vocab, struct error *err) {
    if (!(p->temperature >= 0 && p->temperature <= 100))
        return error_set(err, "temperature: expected 0 to 100, found %g", p->temperature);
    if (p->top_k < 0) return error_set(err, "top_k: expected 0 (off) or more, found %d", p->top_k);
    if (!(p->top_p > 0 && p->top_p <= 1))
        return error_set(err, "top_p: expected above 0 and at most 1, found %g", p->top_p);
    if (!(p->min_p >= 0 && p->min_p <= 1)) return error_set(err, "min_p: expected 0 to 1, found %g", p->min_p);
    if (!(p->repeat_penalty > 0 && p->repeat_penalty <= 100))
        return error_set(err, "repeat_penalty: expected above 0 and at most 100, found %g", p->repeat_penalty);
    if (!(fabs(p->presence_penalty) <= 2))
        return error_set(err, "presence_penalty: expected -2 to 2, found %g", p->presence_penalty);
    if (!(fabs(p->frequency_penalty) <= 2))
        return error_set(err, "frequency_penalty: expected -2 to 2, found %g", p->frequency_penalty);
    for (size_t i = 0; i < p->n_bias; i++) {
        if (p->bias_ids[i] < 0 || (size_t)p->bias_ids[i] >= n_vocab)
            return error_set(err, "logit_bias: token id %d is not in the vocabulary of %zu", p->bias_ids[i], n_vocab);
        if (!(fabsf(p->bias[i]) <= 1000))
            return error_set(err, "logit_bias of token %d: expected -1000 to 1000, found %g", p->bias_ids[i],
                             (double)p->bias[i]);
    }
    return true;
}

double sampler_uniform(uint64_t seed, uint64_t position, int32_t id) {
    uint64_t bits = sampling_random(sampling_key(seed, position), id);
    return ((double)(bits >> 12) + 0.5) * 0x1p-52; // odd multiples of 2^-53: never 0, never 1
}

// Applies biases and penalties to the working copy.
static void adjust(struct sampler *s, const tandem_sampling *p, struct sampler_history h) {
    for (size_t i = 0; i < p->n_bias; i++) s->logits[p->bias_ids[i]] += p->bias[i];
    if (p->repeat_penalty != 1) {
        for (size_t i = 0; i < h.n; i++) {
            int32_t id = h.ids[i];
            if (s->count[id]++) continue; // once for each token
            float *l = &s->logits[id];
            *l = *l > 0 ? *l / (float)p->repeat_penalty : *l * (float)p->repeat_penalty;
        }
        for (size_t i = 0; i < h.n; i++) s->count[h.ids[i]] = 0;
    }
    if (p->presence_penalty != 0 || p->frequency_penalty != 0) {
        for (size_t i = h.n_prompt; i < h.n; i++) {
            int32_t id = h.ids[i];
            if (s->count[id]++ == 0) s->logits[id] -= (float)p->presence_penalty;
            s->logits[id] -= (float)p->frequency_penalty;
        }
        for (size_t i = h.n_prompt; i < h.n; i++) s->count[h.ids[i]] = 0;
    }
}

// Better first (ops/sampling.h). A total order, so that sorting has one result.
static int compare(const void *a, const void *b) {
    const struct candidate *x = a, *y = b;
    uint64_t p = sampling_place(x->logit, x->id), q = sampling_place(y->logit, y->id);
    return (p < q) - (p > q);
}

static bool better(struct candidate a, struct candidate b) {
    return sampling_place(a.logit, a.id) > sampling_place(b.logit, b.id);
}

// Moves c[i] of a heap of n, in which nothing is worse than what stands above it, down to its place.
static void sink(struct candidate *c, size_t n, size_t i) {
    for (;;) {
        size_t worst = i, left = 2 * i + 1;
        if (left < n && better(c[worst], c[left])) worst = left;
        if (left + 1 < n && better(c[worst], c[left + 1])) worst = left + 1;
        if (worst == i) return;
        struct candidate t = c[i];
        c[i] = c[worst];
        c[worst] = t;
        i = worst;
    }
}

// Moves the k best of n candidates to the front, in order (quickselect by Hoare's partition, then a sort of the front).
static void select_best(struct candidate *c, size_t n, size_t k) {
    size_t lo = 0, hi = n; // c[0..lo) are among the best, c[hi..n) are not
    while (hi - lo > 1 && lo < k && k < hi) {
        struct candidate pivot = c[lo + (hi - lo) / 2];
        size_t i = lo, j = hi; // c[lo..i) are not worse than the pivot, c[j..hi) not better
        while (i < j) {
            while (better(c[i], pivot)) i++;
            while (better(pivot, c[j - 1])) j--;
            if (i + 1 >= j) break; // only the pivot lies between
            struct candidate t = c[i];
            c[i] = c[j - 1];
            c[j - 1] = t;
        }
        // Ids differ, so exactly one element equals the pivot, and it stands at i.
        if (k <= i) hi = i;
        else lo = i + 1;
    }
    qsort(c, k, sizeof *c, compare);
}

// The highest of n logits; of equal ones the first.
static int32_t greedy(const float *logits, size_t n) {
    float most[LANES];
    size_t best = 0, i = 0;
    for (size_t k = 0; k < LANES; k++) most[k] = -INFINITY;
    for (; i + LANES <= n; i += LANES)
        for (size_t k = 0; k < LANES; k++) most[k] = logits[i + k] > most[k] ? logits[i + k] : most[k];
    float highest = -INFINITY;
    for (size_t k = 0; k < LANES; k++) highest = most[k] > highest ? most[k] : highest;
    for (; i < n; i++) highest = logits[i] > highest ? logits[i] : highest;
    while (best + 1 < n && logits[best] != highest) best++;
    return (int32_t)best;
}

// Writes the k best of n logits to c, in order, without looking at most of them twice: a heap of the best so far, the
// worst of them on top. Later ids are worse than equal earlier ones, so that a logit must be higher to get in.
static void take_best(struct candidate *c, const float *logits, size_t n, size_t k) {
    for (size_t i = 0; i < k; i++) c[i] = (struct candidate){.logit = logits[i], .id = (int32_t)i};
    for (size_t i = k / 2; i-- > 0;) sink(c, k, i);
    for (size_t i = k, end; i < n; i = end) {
        end = i + LANES < n ? i + LANES : n;
        int any = end - i < LANES;
        for (size_t j = 0; j < LANES && i + LANES <= n; j++) any |= logits[i + j] > c[0].logit;
        for (size_t j = i; any && j < end; j++) {
            if (!(logits[j] > c[0].logit)) continue;
            c[0] = (struct candidate){.logit = logits[j], .id = (int32_t)j};
            sink(c, k, 0);
        }
    }
    qsort(c, k, sizeof *c, compare);
}

static uint64_t weights_of(const struct candidate *c, size_t n, float best, float scale) {
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) sum += sampling_weight(c[i].logit, best, scale);
    return sum;
}

// Moves the tokens that top_k and top_p keep of n logits to the front of the candidates. Returns how many.
static size_t keep(struct candidate *c, const float *logits, size_t n, const tandem_sampling *p, float best,
                   float scale) {
    size_t k = n;
    if (p->top_k > 0 && (size_t)p->top_k < n) k = (size_t)p->top_k;
    if (k < n && k <= FEW) {
        take_best(c, logits, n, k);
    } else {
        for (size_t i = 0; i < n; i++) c[i] = (struct candidate){.logit = logits[i], .id = (int32_t)i};
        if (k < n) select_best(c, n, k);
    }
    if (!(p->top_p < 1)) return k;
    double most = p->top_p * (double)weights_of(c, k, best, scale);
    size_t sorted = k < n ? k : 0, kept = 0; // c[0..sorted) are the best, in order
    for (uint64_t sum = 0; kept < k && (kept == 0 || (double)sum < most); kept++) {
        if (kept == sorted) { // few are kept, as a rule: the others need no order
            size_t more = sorted ? 7 * sorted : 64;
            if (more > k - sorted) more = k - sorted;
            select_best(c + sorted, n - sorted, more);
            sorted += more;
        }
        sum += sampling_weight(c[kept].logit, best, scale);
    }
    return kept;
}

// The noise is at most this: -ln u >= 1 - u. sampling_loses is closer to it, and takes a processor twice as long.
static float quick_bound(uint64_t random) {
    return random == UINT64_MAX ? 66.0f : (float)(__builtin_clzll(~random) + 2);
}

// The best score of those that min_p keeps. The noise of most is not needed to see that they lose.
static int32_t draw(const struct candidate *c, size_t n, const tandem_sampling *p, uint64_t key, float best,
                    double scale) {
    int32_t chosen = -1;
    double highest = -INFINITY;
    for (size_t i = 0; i < n; i++) {
        uint64_t random = sampling_random(key, c[i].id);
        if (sampling_score(c[i].logit, scale, quick_bound(random)) < highest) continue;
        if (p->min_p > 0 && (double)sampling_weight(c[i].logit, best, (float)scale) < p->min_p * (double)SAMPLING_ONE)
            continue;
        double score = sampling_score(c[i].logit, scale, sampling_noise(random));
        if (chosen < 0 || score > highest || (score == highest && c[i].id < chosen)) {
            chosen = c[i].id;
            highest = score;
        }
    }
    return chosen;
}

// Whether anything changes the logits before a choice.
static bool changes(const tandem_sampling *p, size_t n_banned, const uint32_t *mask) {
    return p->n_bias || p->repeat_penalty != 1 || p->presence_penalty != 0 || p->frequency_penalty != 0 || n_banned ||
           mask;
}

int32_t sampler_choose(struct sampler *s, const tandem_sampling *p, const float *logits, struct sampler_history h,
                       const int32_t *banned, size_t n_banned, const uint32_t *mask) {
    if (changes(p, n_banned, mask)) {
        memcpy(s->logits, logits, s->n_vocab * sizeof *logits);
        adjust(s, p, h);
        for (size_t i = 0; i < n_banned; i++)
            if (banned[i] >= 0 && (size_t)banned[i] < s->n_vocab) s->logits[banned[i]] = -INFINITY;
        for (size_t i = 0; mask && i < s->n_vocab; i++)
            if (!(mask[i / 32] >> i % 32 & 1)) s->logits[i] = -INFINITY;
        logits = s->logits;
    }
    int32_t best = greedy(logits, s->n_vocab);
    if (p->temperature == 0) return best;
    double scale = sampling_scale(p->temperature);
    size_t n = keep(s->candidates, logits, s->n_vocab, p, logits[best], (float)scale);
    return draw(s->candidates, n, p, sampling_key(p->seed, h.n), logits[best], scale);
}

// What turns logits into natural logs of the softmax's probabilities.
struct norm {
    double max, log_sum;
};

static struct norm norm_of(const float *logits, size_t n) {
    struct norm norm = {.max = (double)logits[greedy(logits, n)]};
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += exp((double)logits[i] - norm.max);
    norm.log_sum = log(sum);
    return norm;
}

static float logprob_of(const float *logits, struct norm norm, int32_t id) {
    return (float)((double)logits[id] - norm.max - norm.log_sum);
}

float logits_logprob(const float *logits, size_t n, int32_t id) {
    return logprob_of(logits, norm_of(logits, n), id);
}

// The best token behind `last`, by going through all; n_vocab: there is none.
static size_t next_best(const float *logits, size_t n_vocab, const tandem_token *last) {
    size_t best = n_vocab;
    for (size_t i = 0; i < n_vocab; i++) {
        bool behind = !last || logits[i] < logits[last->id] || (logits[i] == logits[last->id] && (int32_t)i > last->id);
        if (behind && (best == n_vocab || logits[i] > logits[best])) best = i;
    }
    return best;
}

static void top_of(const float *logits, size_t n_vocab, struct norm norm, tandem_token *top, size_t n) {
    struct candidate few[FEW];
    bool is_few = n <= FEW && n <= n_vocab;
    if (is_few) take_best(few, logits, n_vocab, n);
    for (size_t k = 0; k < n; k++) {
        size_t best = is_few ? (size_t)few[k].id : next_best(logits, n_vocab, k ? &top[k - 1] : NULL);
        if (best == n_vocab) best = 0; // n > n_vocab: the caller asked for too many
        top[k] = (tandem_token){.id = (int32_t)best, .logprob = logprob_of(logits, norm, (int32_t)best)};
    }
}

void logits_top(const float *logits, size_t n_vocab, tandem_token *top, size_t n) {
    top_of(logits, n_vocab, norm_of(logits, n_vocab), top, n);
}

void logits_logprobs(const float *logits, size_t n_vocab, tandem_token *token, tandem_token *top, size_t n) {
    struct norm norm = norm_of(logits, n_vocab);
    token->logprob = logprob_of(logits, norm, token->id);
    top_of(logits, n_vocab, norm, top, n);
}

bool logits_finite(const float *logits, size_t n) {
    float sums[LANES] = {0}, sum = 0; // x * 0 is 0 for a finite x and NaN for any other
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t k = 0; k < LANES; k++) sums[k] += logits[i + k] * 0.0f;
    for (size_t k = 0; k < LANES; k++) sum += sums[k];
    for (; i < n; i++) sum += logits[i] * 0.0f;
    return sum == 0;
}

uint64_t logits_hash(uint64_t hash, const float *logits, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &logits[i], sizeof bits);
        hash = (hash ^ bits) * 0x100000001B3u; // FNV's prime, one multiplication a value
        hash ^= hash >> 29;
    }
    return hash;
}
