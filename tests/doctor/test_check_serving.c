// The serving stage: healthy engines pass, and each of an engine's ways to lose or mix up KV is found. The engine's
// functions are replaced at link time (Makefile): `broken` says which one misbehaves.
#include "helpers.h"

enum broken { NOTHING, NO_COPY, KEEPS_TOO_MUCH, OTHERS_PAGE, ONE_POSITION_SHORT, STALE_LOGITS };
static enum broken broken;

void __real_kv_store_copy_page(struct kv_store *kv, size_t from, size_t to);
void __wrap_kv_store_copy_page(struct kv_store *kv, size_t from, size_t to);
void __wrap_kv_store_copy_page(struct kv_store *kv, size_t from, size_t to) {
    if (broken != NO_COPY) __real_kv_store_copy_page(kv, from, to);
}

void __real_kv_trim(struct kv_pool *p, struct kv_seq *seq, size_t n);
void __wrap_kv_trim(struct kv_pool *p, struct kv_seq *seq, size_t n);
void __wrap_kv_trim(struct kv_pool *p, struct kv_seq *seq, size_t n) {
    if (broken == KEEPS_TOO_MUCH && n > 8 && n < seq->n_kv) n++;
    __real_kv_trim(p, seq, n);
}

size_t __real_kv_match(struct kv_pool *p, struct kv_seq *seq, const int32_t *ids, size_t n, size_t limit);
size_t __wrap_kv_match(struct kv_pool *p, struct kv_seq *seq, const int32_t *ids, size_t n, size_t limit);
size_t __wrap_kv_match(struct kv_pool *p, struct kv_seq *seq, const int32_t *ids, size_t n, size_t limit) {
    size_t found = __real_kv_match(p, seq, ids, n, limit);
    if (broken == OTHERS_PAGE && seq->n_pages > 1) { // the first page stands for the second, too
        kv_share(p, seq->pages[0]);
        kv_drop(p, seq->pages[1]);
        seq->pages[1] = seq->pages[0];
    }
    return found;
}

void __real_model_queue(const struct model *m, struct run *run, struct kv_store *kv, const struct batch *b);
void __wrap_model_queue(const struct model *m, struct run *run, struct kv_store *kv, const struct batch *b);
void __wrap_model_queue(const struct model *m, struct run *run, struct kv_store *kv, const struct batch *b) {
    if (broken == ONE_POSITION_SHORT && b->n_seqs > 1) { // a batch's last sequence restarts its positions
        int32_t *position = calloc(b->n_tokens, sizeof *position);
        assert_non_null(position);
        memcpy(position, b->position, b->n_tokens * sizeof *position);
        size_t last = b->n_tokens - 1;
        if (position[last] > 0) position[last]--;
        struct batch shifted = *b;
        shifted.position = position;
        __real_model_queue(m, run, kv, &shifted);
        free(position);
        return;
    }
    if (broken == STALE_LOGITS && b->n_tokens == 7) { // a chunk of seven writes no K and V of its last token
        struct batch shorter = *b;
        int32_t seq_start[2] = {0, 6};
        shorter.n_tokens = 6;
        shorter.n_logit_rows = 0;
        shorter.seq_start = seq_start;
        __real_model_queue(m, run, kv, &shorter);
        return;
    }
    __real_model_queue(m, run, kv, b);
}

static void healthy_engines_pass(void **state) {
    (void)state;
    static const char *const models[] = {"synthetic:tiny-qwen3", "synthetic:tiny-qwen2:q8_0",
                                         "synthetic:tiny-llama:f16"};
    broken = NOTHING;
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        struct clinic c = open_clinic(models[i], 1u << STAGE_SERVING);
        c.doctor->options.budget = 100;
        examine(&c);
        expect_healthy(&c);
        double preemptions = 0, cached = 0;
        const struct stage_report *s = &c.report->stages[STAGE_SERVING];
        for (size_t k = 0; k < s->n_figures; k++) {
            if (strcmp(s->figures[k].name, "preemptions") == 0) preemptions = s->figures[k].value;
            if (strcmp(s->figures[k].name, "cached_tokens") == 0) cached = s->figures[k].value;
        }
        assert_true(preemptions > 0); // what is claimed to be checked did happen
        assert_true(cached > 0);
        close_clinic(&c);
    }
}

static void expect_serving_fault(enum broken what, const char *check) {
    struct clinic c = open_clinic("synthetic:tiny-qwen3", 1u << STAGE_SERVING);
    c.doctor->options.budget = 100;
    broken = what;
    examine(&c);
    broken = NOTHING;
    assert_int_equal(c.report->verdict, VERDICT_FAULT);
    assert_int_equal(c.report->first.kind, FAULT_SERVING);
    bool named = false;
    const struct stage_report *s = &c.report->stages[STAGE_SERVING];
    for (size_t i = 0; i < s->n_faults && i < MAX_FAULTS; i++) named = named || strcmp(s->faults[i].check, check) == 0;
    if (!named) fail_msg("expected \"%s\" to fail, found: %s", check, c.report->first.message);
    close_clinic(&c);
}

static void a_forked_page_is_not_copied(void **state) {
    (void)state;
    expect_serving_fault(NO_COPY, "forks do not disturb each other");
}

static void a_truncation_keeps_a_stale_position(void **state) {
    (void)state;
    expect_serving_fault(KEEPS_TOO_MUCH, "prefix reuse = cold");
}

static void the_cache_gives_a_wrong_page(void **state) {
    (void)state;
    expect_serving_fault(OTHERS_PAGE, "prefix cache = cold");
}

static void a_batch_shifts_a_position(void **state) {
    (void)state;
    expect_serving_fault(ONE_POSITION_SHORT, "batch 1 = batch N");
}

static void a_chunk_loses_its_last_token(void **state) {
    (void)state;
    expect_serving_fault(STALE_LOGITS, "the chunk size does not matter");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(healthy_engines_pass),
        cmocka_unit_test(a_forked_page_is_not_copied),
        cmocka_unit_test(a_truncation_keeps_a_stale_position),
        cmocka_unit_test(the_cache_gives_a_wrong_page),
        cmocka_unit_test(a_batch_shifts_a_position),
        cmocka_unit_test(a_chunk_loses_its_last_token),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
