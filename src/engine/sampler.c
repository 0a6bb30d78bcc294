// sampler.c: see sampler.h.
#include "engine/sampler.h"

#include "base/size.h"
#include "ops/sampling.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

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

static int32_t greedy(const float *logits, size_t n) {
    size_t best = 0;
    for (size_t i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return (int32_t)best;
}

static uint64_t weights_of(const struct candidate *c, size_t n, float best, float scale) {
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) sum += sampling_weight(c[i].logit, best, scale);
    return sum;
}

// Moves the tokens that top_k and top_p keep to the front of all `n` candidates. Returns how many.
static size_t keep(struct candidate *c, size_t n, const tandem_sampling *p, float best, float scale) {
    size_t k = n;
    if (p->top_k > 0 && (size_t)p->top_k < n) select_best(c, n, k = (size_t)p->top_k);
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

// The best score of those that min_p keeps. The noise of most is not needed to see that they lose.
static int32_t draw(const struct candidate *c, size_t n, const tandem_sampling *p, uint64_t key, float best,
                    double scale) {
    int32_t chosen = -1;
    double highest = -INFINITY;
    for (size_t i = 0; i < n; i++) {
        uint64_t random = sampling_random(key, c[i].id);
        if (sampling_score(c[i].logit, scale, sampling_noise_bound(random)) < highest) continue;
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

int32_t sampler_choose(struct sampler *s, const tandem_sampling *p, const float *logits, struct sampler_history h,
                       const int32_t *banned, size_t n_banned, const uint32_t *mask) {
    memcpy(s->logits, logits, s->n_vocab * sizeof *logits);
    adjust(s, p, h);
    for (size_t i = 0; i < n_banned; i++)
        if (banned[i] >= 0 && (size_t)banned[i] < s->n_vocab) s->logits[banned[i]] = -INFINITY;
    for (size_t i = 0; mask && i < s->n_vocab; i++)
        if (!(mask[i / 32] >> i % 32 & 1)) s->logits[i] = -INFINITY;
    int32_t best = greedy(s->logits, s->n_vocab);
    if (p->temperature == 0) return best;
    for (size_t i = 0; i < s->n_vocab; i++)
        s->candidates[i] = (struct candidate){.logit = s->logits[i], .id = (int32_t)i};
    double scale = sampling_scale(p->temperature);
    size_t n = keep(s->candidates, s->n_vocab, p, s->logits[best], (float)scale);
    return draw(s->candidates, n, p, sampling_key(p->seed, h.n), s->logits[best], scale);
}

float logits_logprob(const float *logits, size_t n, int32_t id) {
    double max = (double)logits[greedy(logits, n)], sum = 0;
    for (size_t i = 0; i < n; i++) sum += exp((double)logits[i] - max);
    return (float)((double)logits[id] - max - log(sum));
}

void logits_top(const float *logits, size_t n_vocab, tandem_token *top, size_t n) {
    double max = (double)logits[greedy(logits, n_vocab)], sum = 0;
    for (size_t i = 0; i < n_vocab; i++) sum += exp((double)logits[i] - max);
    for (size_t k = 0; k < n; k++) {
        size_t best = n_vocab;
        for (size_t i = 0; i < n_vocab; i++) {
            bool after_last = k == 0 || logits[i] < logits[top[k - 1].id] ||
                              (logits[i] == logits[top[k - 1].id] && (int32_t)i > top[k - 1].id);
            if (after_last && (best == n_vocab || logits[i] > logits[best])) best = i;
        }
        if (best == n_vocab) best = 0; // n > n_vocab: the caller asked for too many
        top[k] = (tandem_token){.id = (int32_t)best, .logprob = (float)((double)logits[best] - max - log(sum))};
    }
}

bool logits_finite(const float *logits, size_t n) {
    float sum = 0; // x * 0 is 0 for a finite x and NaN for any other
    for (size_t i = 0; i < n; i++) sum += logits[i] * 0.0f;
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
