// test_diff.c: traces made by hand: what is measured, where a departure is seen, and files that are broken anywhere.
// Traces of real runs are compared in tests/e2e/test_diff.py.
#include "doctor/diff.h"

#include "base/file.h"
#include "format/safetensors.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { ROWS = 6, HIDDEN = 8, N_TENSORS = 6 };

// Two layers' worth of a trace whose tensors all hold the same noise: only their names and changes matter.
struct trace {
    int32_t ids[ROWS], positions[ROWS];
    float data[N_TENSORS][ROWS][HIDDEN];
    size_t n_rows;
};

static const char *const names[N_TENSORS] = {"embed",           "layers.0.attn_norm", "layers.0.q",
                                             "layers.0.q_rope", "layers.0.resid",     "layers.1.attn_norm"};

static void fill(struct trace *t) {
    srand(3);
    t->n_rows = ROWS;
    for (int r = 0; r < ROWS; r++) {
        t->ids[r] = 10 + r;
        t->positions[r] = r;
    }
    for (int i = 0; i < N_TENSORS; i++)
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < HIDDEN; c++) t->data[i][r][c] = (float)(rand() % 2000 - 1000) / 500;
}

static void write_trace(const char *path, const struct trace *t, const char *precision) {
    struct tensor all[N_TENSORS + 2];
    size_t n = 0;
    all[n++] = (struct tensor){
        .name = "ids", .type = DTYPE_I32, .rank = 1, .shape = {ROWS}, .n_bytes = sizeof t->ids, .data = t->ids};
    all[n++] = (struct tensor){.name = "positions",
                               .type = DTYPE_I32,
                               .rank = 1,
                               .shape = {t->n_rows},
                               .n_bytes = t->n_rows * sizeof t->positions[0],
                               .data = t->positions};
    for (int i = 0; i < N_TENSORS; i++)
        all[n++] = (struct tensor){.name = names[i],
                                   .type = DTYPE_F32,
                                   .rank = 2,
                                   .shape = {t->n_rows, HIDDEN},
                                   .n_bytes = t->n_rows * HIDDEN * sizeof(float),
                                   .data = t->data[i]};
    const struct safetensors_meta meta[] = {
        {"precision", precision}, {"n_heads", "2"}, {"n_kv_heads", "1"}, {"head_dim", "4"}};
    struct error err = {0};
    if (!safetensors_write(path, all, n, meta, 4, &err)) fail_msg("%s", err.text);
}

static char path_a[] = "/tmp/tandem-diff-a-XXXXXX", path_b[] = "/tmp/tandem-diff-b-XXXXXX";

static int make_files(void **state) {
    (void)state;
    int a = mkstemp(path_a), b = mkstemp(path_b);
    if (a < 0 || b < 0) return -1;
    close(a);
    close(b);
    return 0;
}

static int drop_files(void **state) {
    (void)state;
    unlink(path_a);
    unlink(path_b);
    return 0;
}

static struct diff *compare(const struct trace *a, const struct trace *b, const char *precision) {
    struct error err = {0};
    write_trace(path_a, a, precision);
    write_trace(path_b, b, precision);
    struct diff *d = diff_open(path_a, path_b, &err);
    if (!d) fail_msg("%s", err.text);
    return d;
}

static struct trace a, b;

static void equal_and_in_order(void **state) {
    (void)state;
    fill(&a);
    struct diff *d = compare(&a, &a, "f32");
    assert_true(d->verdict == DIFF_EQUAL && d->n == N_TENSORS && d->n_equal == N_TENSORS && d->first == d->n);
    for (int i = 0; i < N_TENSORS; i++) assert_string_equal(d->tensors[i].name, names[i]);
    assert_true(d->tensors[2].n_heads == 2 && d->tensors[2].head_dim == 4 && d->tensors[0].n_heads == 0);
    struct buffer page = {0};
    assert_true(diff_html(d, &page, NULL));
    assert_non_null(strstr(buffer_text(&page), "Equal, every element"));
    buffer_free(&page);
    diff_free(d);
    diff_free(NULL);
}

static void measures(void **state) {
    (void)state;
    fill(&a);
    b = a;
    b.data[3][2][5] += 3; // q_rope, position 2, head 1, channel 1
    b.data[3][4][6] -= 1;
    struct diff *d = compare(&a, &b, "bf16");
    const struct diff_tensor *t = &d->tensors[3];
    double squares = 0, row = 0;
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < HIDDEN; c++) squares += (double)a.data[3][r][c] * (double)a.data[3][r][c];
    for (int c = 0; c < HIDDEN; c++) row += (double)a.data[3][2][c] * (double)a.data[3][2][c];
    assert_true(d->verdict == DIFF_DEPARTS && d->first == 3 && t->n_different == 2);
    assert_true(fabs(t->max_abs - 3) < 1e-6 && fabs(t->rms_relative - sqrt(10 / squares)) < 1e-6);
    assert_true(t->error >= sqrt(9 / row) - 1e-6); // at least row 2's
    assert_true(t->first.position == 2 && t->first.column == 5 && t->worst.position == 2);
    assert_true(t->limit > 0 && t->input_error == 0);
    struct diff_profile p;
    struct buffer extent = {0};
    assert_true(diff_profile(d, t, &p, NULL));
    assert_true(p.rows[0] == 0 && p.rows[2] > p.rows[4] && p.rows[4] > 0 && p.heads[0] == 0 && p.heads[1] > 0);
    assert_true(p.columns[4] == 0 && p.columns[5] > p.columns[6]);
    struct diff_place at = diff_first_wrong(d, t, &p);
    assert_true(at.position == 2 && at.column == 5 && at.b - at.a > 2.9);
    assert_true(diff_extent(d, t, &p, &extent));
    assert_string_equal(buffer_text(&extent), "positions 2, 4; head 1 alone; columns 5 to 6");
    buffer_free(&extent);
    diff_profile_free(&p);
    diff_free(d);
}

// An error that an op passes on is not its own.
static void blame_goes_to_the_first(void **state) {
    (void)state;
    fill(&a);
    b = a;
    for (int i = 2; i < N_TENSORS; i++)
        for (int r = 3; r < ROWS; r++)
            for (int c = 0; c < HIDDEN; c++) b.data[i][r][c] *= 1.3f;
    struct diff *d = compare(&a, &b, "bf16");
    assert_true(d->first == 2 && d->n_departs == 1 && d->n_later == 3 && d->n_equal == 2);
    diff_free(d);
    // The same a little at a time, within bf16's rounding, is no departure; for f32 it is.
    for (int i = 0; i < N_TENSORS; i++)
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < HIDDEN; c++) b.data[i][r][c] = a.data[i][r][c] * (1 + 0.001f * (float)(i + 1));
    d = compare(&a, &b, "bf16");
    assert_true(d->verdict == DIFF_ROUNDING && d->n_rounding == N_TENSORS && d->n_departs == 0);
    diff_free(d);
    d = compare(&a, &b, "f32");
    assert_true(d->verdict == DIFF_DEPARTS && d->first == 0);
    diff_free(d);
}

static void rows_are_matched_by_position(void **state) {
    (void)state;
    fill(&a);
    b = a;
    b.n_rows = 2;
    b.positions[0] = 1;
    b.positions[1] = 4;
    for (int i = 0; i < N_TENSORS; i++) {
        memcpy(b.data[i][0], a.data[i][1], sizeof b.data[i][0]);
        memcpy(b.data[i][1], a.data[i][4], sizeof b.data[i][1]);
    }
    struct diff *d = compare(&a, &b, "f32");
    assert_true(d->verdict == DIFF_EQUAL && d->n_rows == 2 && d->positions[1] == 4);
    diff_free(d);
}

static void infinities_and_zeros(void **state) {
    (void)state;
    fill(&a);
    memset(a.data[0], 0, sizeof a.data[0]);
    a.data[1][1][1] = INFINITY;
    a.data[2][0][0] = NAN;
    b = a;
    struct diff *d = compare(&a, &b, "bf16");
    assert_true(d->verdict == DIFF_EQUAL);
    diff_free(d);
    b.data[1][1][1] = -INFINITY;
    b.data[0][3][3] = 1; // beside zeros
    d = compare(&a, &b, "bf16");
    assert_true(d->tensors[0].departs && isfinite(d->tensors[0].error) && isinf(d->tensors[1].error));
    struct buffer page = {0};
    assert_true(diff_html(d, &page, NULL));
    buffer_free(&page);
    diff_free(d);
}

// Whatever stands in a file, it is compared or refused.
static void broken_files(void **state) {
    (void)state;
    fill(&a);
    write_trace(path_a, &a, "bf16");
    struct buffer good = {0};
    size_t refused = 0;
    assert_true(file_read(path_a, 1 << 20, &good, NULL));
    for (int i = 0; i < 1500; i++) {
        struct buffer bad = {0};
        assert_true(buffer_append(&bad, good.data, good.len));
        for (int k = rand() % 3; k >= 0; k--) bad.data[(size_t)rand() % (i % 2 ? 700 : bad.len)] = (char)(rand() >> 5);
        if (i % 7 == 0) bad.len = (size_t)rand() % bad.len;
        assert_true(file_write(path_b, bad.data, bad.len, NULL));
        struct error err = {0};
        struct diff *d = i % 3 ? diff_open(path_a, path_b, &err) : diff_open(path_b, path_a, &err);
        struct buffer page = {0};
        if (d) assert_true(diff_html(d, &page, NULL));
        else assert_true(err.text[0] && ++refused);
        buffer_free(&page);
        diff_free(d);
        buffer_free(&bad);
    }
    assert_in_range(refused, 300, 1499);
    buffer_free(&good);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equal_and_in_order),      cmocka_unit_test(measures),
        cmocka_unit_test(blame_goes_to_the_first), cmocka_unit_test(rows_are_matched_by_position),
        cmocka_unit_test(infinities_and_zeros),    cmocka_unit_test(broken_files),
    };
    return cmocka_run_group_tests(tests, make_files, drop_files);
}
