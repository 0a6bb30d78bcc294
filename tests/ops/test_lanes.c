// test_lanes.c: products of BF16 rows with many tokens, which AVX2 multiplies lane by lane, return the bits of single
// tokens and of the portable ops: at every edge of a tile, of a group of tokens and of a block, on any number of
// threads.
#include "helpers.h"

static struct matrix make(size_t n_out, size_t n_in) {
    struct matrix w = {.name = "w", .type = DTYPE_BF16, .n_out = n_out, .n_in = n_in, .row_bytes = 2 * n_in};
    uint16_t *data = checked_alloc(n_out * n_in, sizeof *data);
    float *v = random_floats(n_out * n_in, 1.0f, (uint32_t)(n_out + n_in));
    for (size_t i = 0; i < n_out * n_in; i++) data[i] = bf16_from_f32(v[i]);
    free(v);
    w.data = data;
    return w;
}

static void product(const struct ops *ops, float *y, const float *x, const struct matrix *w, size_t n_tokens,
                    int n_threads) {
    struct op_ctx ctx = open_ctx(ops, (struct ops_limits){n_tokens, 1, w->n_in, 1, 16, n_threads}, 0);
    ops->matmul(&ctx, y, x, w, n_tokens);
    close_ctx(&ctx);
}

static void check(const struct matrix *w, size_t n_tokens) {
    const struct ops *ops = ops_cpu(NULL, NULL), *plain = ops_cpu("portable", NULL);
    const size_t floats = n_tokens * w->n_out;
    float *x = random_floats(n_tokens * w->n_in, 2.0f, (uint32_t)n_tokens), *all = nan_floats(floats),
          *two = nan_floats(floats), *each = nan_floats(floats), *portable = nan_floats(floats);
    product(ops, all, x, w, n_tokens, 1);
    product(ops, two, x, w, n_tokens, 2);
    product(plain, portable, x, w, n_tokens, 1);
    for (size_t t = 0; t < n_tokens; t++) product(ops, each + t * w->n_out, x + t * w->n_in, w, 1, 1);
    if (memcmp(all, each, floats * sizeof *all) != 0 || memcmp(all, two, floats * sizeof *all) != 0 ||
        memcmp(all, portable, floats * sizeof *all) != 0)
        fail_msg("[%zu, %zu], %zu tokens: other bits", w->n_out, w->n_in, n_tokens);
    free(x), free(all), free(two), free(each), free(portable);
}

static void every_edge(void **state) {
    (void)state;
    static const size_t shapes[][2] = {{16, 32}, {1, 64}, {15, 96}, {17, 160}, {40, 1024}, {33, 48}, {16, 40}};
    static const size_t tokens[] = {6,  11, 12, 13, 17, 23,  24,  25,  26,  27,  28, 29,
                                    30, 31, 47, 48, 49, 125, 126, 127, 131, 253, 300};
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        struct matrix w = make(shapes[s][0], shapes[s][1]);
        for (size_t i = 0; i < sizeof tokens / sizeof tokens[0]; i++) check(&w, tokens[i]);
        free((void *)(uintptr_t)w.data);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_edge)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
