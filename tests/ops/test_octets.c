// test_octets.c: products with rows in octets (format/octets.h) return the bits of products with the rows as stored,
// for every type, at every edge of a tile, in every instruction set that this CPU has; and packing loses nothing.
#include "base/size.h"
#include "format/octets.h"
#include "helpers.h"

static const enum dtype types[] = {DTYPE_BF16, DTYPE_Q8_0, DTYPE_Q4_0, DTYPE_Q4_1, DTYPE_Q5_0,
                                   DTYPE_Q5_1, DTYPE_Q4_K, DTYPE_Q5_K, DTYPE_Q6_K};
enum { N_TYPES = sizeof types / sizeof types[0] };

static uint32_t random_word(uint32_t *rng) {
    *rng = *rng * 1664525u + 1013904223u;
    return *rng >> 8;
}

// Random blocks, or (fill >= 0) blocks of one byte, which reach the ends of the integers' range; their f16 are finite.
static struct matrix make(enum dtype type, size_t n_out, size_t n_in, int fill, uint32_t seed) {
    struct matrix w = {.name = "w", .type = type, .n_out = n_out, .n_in = n_in};
    const struct dtype_info *info = dtype_info(type);
    assert_true(dtype_row_bytes(type, n_in, &w.row_bytes));
    unsigned char *data = checked_alloc(n_out, w.row_bytes);
    for (size_t i = 0; i < n_out * w.row_bytes; i++)
        data[i] = (unsigned char)(fill < 0 ? (int)random_word(&seed) : fill);
    const size_t at = type == DTYPE_Q6_K ? 208 : 0;
    for (size_t i = 0; type == DTYPE_BF16 && i < n_out * n_in; i++) {
        uint16_t h = bf16_from_f32(uniform(&seed));
        memcpy(data + 2 * i, &h, 2);
    }
    const bool two = type == DTYPE_Q4_1 || type == DTYPE_Q5_1 || type == DTYPE_Q4_K || type == DTYPE_Q5_K;
    for (size_t i = 0; type != DTYPE_BF16 && i < n_out * w.row_bytes; i += info->block_bytes) {
        uint16_t d[2] = {f16_from_f32(uniform(&seed)), f16_from_f32(uniform(&seed))};
        memcpy(data + i + at, d, two ? 4 : 2);
    }
    w.data = data;
    return w;
}

static unsigned char *pack(const struct matrix *w) {
    size_t bytes = w->n_out / OCTET_ROWS * OCTET_ROWS * w->row_bytes;
    unsigned char *to = checked_alloc(bytes + 1, 1), *back = checked_alloc(bytes + 1, 1);
    for (size_t at = 0; at < bytes; at += OCTET_ROWS * w->row_bytes) {
        octets_pack(w->type, to + at, (const unsigned char *)w->data + at, w->row_bytes);
        octets_unpack(w->type, back + at, to + at, w->row_bytes);
    }
    assert_memory_equal(back, w->data, bytes);
    free(back);
    return to;
}

static void same_bits(const char *isa, const struct matrix *rows, const struct matrix *octets, size_t n_tokens,
                      int n_threads, float x_scale) {
    const struct ops *ops = ops_cpu(isa, NULL);
    struct ops_limits limits = {n_tokens, 1, rows->n_in, 1, 16, n_threads};
    struct op_ctx ctx = open_ctx(ops, limits, 0);
    float *x = random_floats(n_tokens * rows->n_in, x_scale, (uint32_t)n_tokens);
    for (size_t i = 0; x_scale < 0 && i < n_tokens * rows->n_in; i++) x[i] = i / 32 % 2 ? x_scale : -x_scale;
    float *a = nan_floats(n_tokens * rows->n_out), *b = nan_floats(n_tokens * rows->n_out);
    ops->matmul(&ctx, a, x, rows, n_tokens);
    ops->matmul(&ctx, b, x, octets, n_tokens);
    for (size_t i = 0; i < n_tokens * rows->n_out; i++) assert_true(a[i] == a[i]);
    if (memcmp(a, b, n_tokens * rows->n_out * sizeof *a) != 0)
        fail_msg("%s, %s [%zu, %zu], %zu tokens: octets give other bits", isa, dtype_info(rows->type)->name,
                 rows->n_out, rows->n_in, n_tokens);
    free(x), free(a), free(b);
    close_ctx(&ctx);
}

static void every_shape(int fill, float x_scale) {
    static const size_t n_outs[] = {3, 8, 16, 24, 47, 64}, n_ins[] = {256, 512}, small_ins[] = {32, 96, 288, 1056};
    static const size_t tokens[] = {1, 2, 3, 4, 5, 7, 8, 9, 33};
    size_t n_isas;
    const struct isa_info *isas = ops_cpu_isas(&n_isas);
    for (size_t t = 0; t < N_TYPES; t++) {
        const bool blocks_of_32 = dtype_info(types[t])->block_len <= 32;
        for (size_t o = 0; o < sizeof n_outs / sizeof n_outs[0]; o++) {
            for (size_t i = 0; i < (blocks_of_32 ? 6u : 2u); i++) {
                struct matrix rows = make(types[t], n_outs[o], i < 2 ? n_ins[i] : small_ins[i - 2], fill, 11);
                struct matrix octets = rows;
                octets.octets = pack(&rows);
                for (size_t k = 0; k < n_isas; k++)
                    for (size_t n = 0; isas[k].available && n < sizeof tokens / sizeof tokens[0]; n++)
                        same_bits(isas[k].name, &rows, &octets, tokens[n], n % 2 ? 2 : 1, x_scale);
                free((void *)(uintptr_t)octets.octets);
                free((void *)(uintptr_t)rows.data);
            }
        }
    }
}

static void random_blocks(void **state) {
    (void)state;
    every_shape(-1, 3.0f);
}

// Integers at the ends of their ranges meet activations at the ends of theirs: nothing saturates on the way.
static void extreme_blocks(void **state) {
    (void)state;
    every_shape(0xFF, -1.0f);
    every_shape(0x80, -1.0f);
    every_shape(0x00, -1.0f);
    every_shape(0x7F, 2.0f);
}

// The octets are what is multiplied: other octets, other results. Without this, the tests above could pass with a
// kernel that never looks at them.
static void octets_are_used(void **state) {
    (void)state;
    const struct ops *ops = ops_cpu(NULL, NULL);
    if (!ops->takes_octets) skip();
    for (size_t t = 0; t < N_TYPES; t++) {
        for (size_t n_tokens = 1; n_tokens <= 8; n_tokens += 7) {
            struct matrix rows = make(types[t], 16, 256, -1, 1), other = make(types[t], 16, 256, -1, 2), mixed = rows;
            mixed.octets = pack(&other);
            struct op_ctx ctx = open_ctx(ops, (struct ops_limits){n_tokens, 1, 256, 1, 16, 1}, 0);
            float *x = random_floats(n_tokens * 256, 1.0f, 5), *a = nan_floats(n_tokens * 16),
                  *b = nan_floats(n_tokens * 16);
            ops->matmul(&ctx, a, x, &other, n_tokens);
            ops->matmul(&ctx, b, x, &mixed, n_tokens);
            assert_memory_equal(a, b, n_tokens * 16 * sizeof *a);
            close_ctx(&ctx);
            free(x), free(a), free(b);
            free((void *)(uintptr_t)mixed.octets);
            free((void *)(uintptr_t)rows.data);
            free((void *)(uintptr_t)other.data);
        }
    }
}

static void other_types(void **state) {
    (void)state;
    assert_true(octets_fit(DTYPE_BF16, 128));
    assert_false(octets_fit(DTYPE_BF16, 96));
    assert_false(octets_known(DTYPE_F32));
    assert_false(octets_known(DTYPE_Q2_K));
    assert_false(octets_known(DTYPE_Q3_K));
    for (size_t t = 0; t < N_TYPES; t++) assert_true(octets_known(types[t]));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_blocks),
        cmocka_unit_test(extreme_blocks),
        cmocka_unit_test(octets_are_used),
        cmocka_unit_test(other_types),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
