// The portable ops against independent f64 computations, with bounds derived from the number of roundings.
#include "helpers.h"

#include "format/groups.h"

#include "ops/cpu/math.h"
#include "ops/kv_page.h"
#include "ops/ops.h"

static struct op_ctx open_portable(int n_threads) {
    struct ops_limits limits = {300, 512, 300, 6, 80, n_threads};
    return open_ctx(ops_cpu("portable", NULL), limits, 0);
}

static void test_exp32(void **state) {
    (void)state;
    assert_true(exp32(-INFINITY) == 0.0f && exp32(0.0f) == 1.0f && isinf(exp32(INFINITY)) && isnan(exp32(NAN)));
    assert_true(exp32(89.0f) == INFINITY && exp32(-104.0f) == 0.0f);
    for (int i = 0; i < 1000000; i++) {
        float x = -103.0f + 191.7f * (float)i / 1e6f;
        double e = exp((double)x), got = (double)exp32(x);
        double ulp = fmax(ldexp(1.0, ilogb(e) - 23), 0x1p-149);
        assert_true(fabs(got - e) <= 1.5 * ulp);
    }
}

// Each lane of dot16 adds in its own order: a sum that keeps its bits only in that order.
static void test_dot16_order(void **state) {
    (void)state;
    uint32_t rng = 1;
    float a[40], b[40], lane[16] = {0};
    for (int k = 0; k < 40; k++) {
        a[k] = uniform(&rng) * ldexpf(1.0f, (k * 7) % 31 - 15);
        b[k] = uniform(&rng);
        lane[k % 16] = fmaf(a[k], b[k], lane[k % 16]);
    }
    float e[8], f[4];
    for (int l = 0; l < 8; l++) e[l] = lane[l] + lane[l + 8];
    for (int l = 0; l < 4; l++) f[l] = e[l] + e[l + 4];
    assert_true(dot16_f32(a, b, 40) == (f[0] + f[2]) + (f[1] + f[3]));
}

// dotpair deals out pairs: lane k / 2 % 16, the odd element first; every length, with and without a half pair.
static void test_dotpair_order(void **state) {
    (void)state;
    uint32_t rng = 1;
    float a[75], b[75];
    for (int k = 0; k < 75; k++) {
        a[k] = bf16_to_f32(bf16_from_f32(uniform(&rng) * ldexpf(1.0f, (k * 7) % 31 - 15)));
        b[k] = bf16_to_f32(bf16_from_f32(uniform(&rng)));
    }
    for (size_t n = 0; n <= 75; n++) {
        float lane[16] = {0}, e[8], f[4];
        for (size_t pair = 0; 2 * pair < n; pair++) {
            size_t k = 2 * pair, l = pair % 16;
            if (k + 1 < n) lane[l] = fmaf(a[k + 1], b[k + 1], lane[l]);
            lane[l] = fmaf(a[k], b[k], lane[l]);
        }
        for (int l = 0; l < 8; l++) e[l] = lane[l] + lane[l + 8];
        for (int l = 0; l < 4; l++) f[l] = e[l] + e[l + 4];
        float dealt_a[75] = {0}, dealt_b[75] = {0};
        for (size_t k = 0; k < n; k++) dealt_a[dealt_place(k, n)] = a[k], dealt_b[dealt_place(k, n)] = b[k];
        assert_true(dotpair_bf16(dealt_a, dealt_b, n) == (f[0] + f[2]) + (f[1] + f[3]));
    }
}

// Activations as integers: the largest becomes +-127, of Q8_0 +-4095, ties go to even, each error is at most half a
// step; tiny blocks are zero, a NaN or Inf makes its block NaN and no other.
static void test_round_activation(void **state) {
    (void)state;
    enum { N = 5 * ACT_BLOCK };
    float x[N];
    double y[N];
    uint32_t rng = 3;
    for (int i = 0; i < N; i++) x[i] = uniform(&rng);
    for (int i = 0; i < 8; i++) x[i] = ((float)i - 3.5f) / 127.0f; // halves of a step
    x[9] = -1.0f, x[10] = 1.0f;
    for (int i = ACT_BLOCK; i < 2 * ACT_BLOCK; i++) x[i] *= 0x1p-101f;
    x[2 * ACT_BLOCK + 3] = NAN;
    x[3 * ACT_BLOCK + 30] = -INFINITY;
    for (int i = 4 * ACT_BLOCK; i < N; i++) x[i] *= 3e38f;
    ops_round_activation(DTYPE_Q4_K, x, y, N);
    for (int i = 0; i < ACT_BLOCK; i++) {
        double step = (double)(1.0f / 127.0f);
        assert_true(fabs(y[i] - (double)x[i]) <= 0.5001 * step);
        assert_true(fmod(y[i], step) == 0);
    }
    const int even[] = {-4, -2, -2, 0, 0, 2, 2, 4};
    for (int i = 0; i < 8; i++) assert_true(y[i] == even[i] * (double)(1.0f / 127.0f));
    assert_true(y[9] == -127 * (double)(1.0f / 127.0f) && y[10] == -y[9]);
    for (int i = ACT_BLOCK; i < 2 * ACT_BLOCK; i++) assert_true(y[i] == 0);
    for (int i = 2 * ACT_BLOCK; i < 4 * ACT_BLOCK; i++) assert_true(isnan(y[i]));
    for (int i = 4 * ACT_BLOCK; i < N; i++) assert_true(fabs(y[i] - (double)x[i]) <= 0.51 * 3e38 / 127);
    ops_round_activation(DTYPE_Q8_0, x, y, N); // in 13 bits
    for (int i = 0; i < ACT_BLOCK; i++) {
        double step = (double)(1.0f / 4095.0f);
        assert_true(fabs(y[i] - (double)x[i]) <= 0.5001 * step);
        assert_true(fmod(y[i], step) == 0);
    }
    assert_true(y[9] == -4095 * (double)(1.0f / 4095.0f) && y[10] == -y[9]);
    for (int i = ACT_BLOCK; i < 2 * ACT_BLOCK; i++) assert_true(y[i] == 0);
    for (int i = 2 * ACT_BLOCK; i < 4 * ACT_BLOCK; i++) assert_true(isnan(y[i]));
    for (int i = 4 * ACT_BLOCK; i < N; i++) assert_true(fabs(y[i] - (double)x[i]) <= 0.51 * 3e38 / 4095);
    ops_round_activation(DTYPE_BF16, x, y, ACT_BLOCK);
    for (int i = 0; i < ACT_BLOCK; i++) assert_true(y[i] == (double)bf16_to_f32(bf16_from_f32(x[i])));
    ops_round_activation(DTYPE_F16, x, y, ACT_BLOCK);
    for (int i = 0; i < ACT_BLOCK; i++) assert_true(y[i] == (double)x[i]);
}

// |dot16 - exact| <= (n/16 + 5) u sum |a b|, u = 2^-24. And each row's bits are the same at any T and thread count.
static void test_matmul(void **state) {
    (void)state;
    enum { N_IN = 83, N_OUT = 37, T = 9 };
    float *x = random_floats(T * N_IN, 1.0f, 1), *wf = random_floats(N_OUT * N_IN, 1.0f, 2);
    static uint16_t wb[N_OUT * N_IN];
    for (int i = 0; i < N_OUT * N_IN; i++) wb[i] = bf16_from_f32(wf[i]);
    for (int bf = 0; bf < 2; bf++) {
        struct matrix w = {"w", bf ? DTYPE_BF16 : DTYPE_F32, N_OUT, N_IN, N_IN * (bf ? 2 : 4), wf, NULL};
        if (bf) w.data = wb;
        float y[T * N_OUT], one[N_OUT];
        struct op_ctx c = open_portable(1), d = open_portable(3);
        c.ops->matmul(&c, y, x, &w, T);
        for (int t = 0; t < T; t++) {
            d.ops->matmul(&d, one, x + t * N_IN, &w, 1);
            assert_memory_equal(one, y + t * N_OUT, sizeof one);
            for (int o = 0; o < N_OUT; o++) {
                double sum = 0, size = 0;
                for (int i = 0; i < N_IN; i++) {
                    float xi = x[t * N_IN + i], wi = wf[o * N_IN + i];
                    if (bf) xi = bf16_to_f32(bf16_from_f32(xi)), wi = bf16_to_f32(wb[o * N_IN + i]);
                    sum += (double)xi * (double)wi;
                    size += fabs((double)xi * (double)wi);
                }
                assert_true(fabs((double)one[o] - sum) <= (N_IN / 16 + 6) * U * size);
            }
        }
        close_ctx(&c);
        close_ctx(&d);
    }
    free(x);
    free(wf);
}

static void test_rmsnorm(void **state) {
    (void)state;
    enum { N = 203 };
    float *x = random_floats(N, 2.0f, 21), *w = random_floats(N, 128.0f, 22), y[N];
    struct op_ctx c = open_portable(2);
    // One hot channel; then values so small that eps is most of the root; then eps alone.
    for (int round = 0; round < 3; round++) {
        x[7] = round == 0 ? 3000.0f : 1.0f;
        for (int i = 0; round > 0 && i < N; i++) x[i] *= round == 1 ? 3e-4f : 0.0f;
        c.ops->rmsnorm(&c, y, x, w, 1e-6f, 1, N);
        double sum = 0;
        for (int i = 0; i < N; i++) sum += (double)x[i] * (double)x[i];
        double r = 1 / sqrt(sum / N + (double)1e-6f);
        // the sum's relative error is halved by the root; six single roundings besides
        for (int i = 0; i < N; i++) {
            double e = (double)x[i] * r * (double)w[i];
            assert_true(fabs((double)y[i] - e) <= ((N / 16 + 5) / 2.0 + 6) * U * fabs(e));
        }
    }
    close_ctx(&c);
    free(x);
    free(w);
}

// Two sequences of 70 and 41 positions on permuted pages, all other slots NaN; attention and the store before it
// against plain f64 softmax, and whole against token by token.
static void test_attention(void **state) {
    (void)state;
    enum { H = 6, KVH = 2, D = 80, T = 111, PAGES = 8, SLOTS = PAGES * KVH * KV_PAGE_TOKENS * D };
    int32_t position[T], seq[T], seq_start[] = {0, 70, T}, page_start[] = {0, 3, 5}, pages[] = {6, 1, 4, 7, 2};
    int32_t kv_len[] = {70, 41};
    for (int t = 0; t < T; t++) seq[t] = t >= 70, position[t] = t - seq_start[seq[t]];
    struct batch b = {.n_tokens = T,
                      .n_seqs = 2,
                      .position = position,
                      .seq = seq,
                      .seq_start = seq_start,
                      .page_start = page_start,
                      .pages = pages,
                      .kv_len = kv_len};
    float *k = random_floats(T * KVH * D, 1.0f, 5), *v = random_floats(T * KVH * D, 1.0f, 6);
    float *q = random_floats(T * H * D, 1.0f, 7), *out = random_floats(T * H * D, 1.0f, 8),
          *again = malloc(T * H * D * 4);
    float *kp = malloc(SLOTS * 4), *vp = malloc(SLOTS * 4);
    assert_true(again && kp && vp);
    for (int i = 0; i < SLOTS; i++) kp[i] = vp[i] = NAN;
    struct kv_layer kv = {DTYPE_F32, kp, vp, PAGES, KVH, D};
    struct op_ctx c = open_portable(3);
    c.ops->kv_store(&c, &kv, &b, k, v);
    struct attention_args a = {&b, H, KVH, D, 1.0f / sqrtf(D), q, &kv, out, NULL};
    ops_attention(&c, &a);
    for (int t = 0; t < T; t++) {
        int first = seq_start[seq[t]];
        for (int h = 0; h < H; h++) {
            double s[T], max = -INFINITY, min = INFINITY, sum = 0, delta = 0;
            for (int j = first; j <= t; j++) {
                double size = 0;
                s[j] = 0;
                for (int i = 0; i < D; i++) {
                    double term = (double)q[(t * H + h) * D + i] * (double)k[(j * KVH + h / 3) * D + i];
                    s[j] += term;
                    size += fabs(term);
                }
                s[j] *= (double)a.scale;
                delta = fmax(delta, (D / 16 + 5 + 1) * U * size * (double)a.scale);
                max = fmax(max, s[j]);
                min = fmin(min, s[j]);
            }
            for (int j = first; j <= t; j++) sum += s[j] = exp(s[j] - max);
            // The relative error of a weight: its score's; s - m rounded, then exp32 (2 U); at each combination the
            // same of the maxima and two roundings; 33 additions in a block. It counts above and below the line.
            double range = max - min, n_blocks = (t - first) / ATTN_BLOCK + 1;
            double bound = 2 * (delta + (range + 2) * U + n_blocks * (range + 4) * U + 33 * U) + U;
            for (int i = 0; i < D; i++) {
                double o = 0;
                for (int j = first; j <= t; j++) o += s[j] / sum * (double)v[(j * KVH + h / 3) * D + i];
                assert_true(fabs(o - (double)out[(t * H + h) * D + i]) <= bound); // |v| <= 1
            }
        }
    }
    for (int t = 0; t < T; t++) {
        struct batch one = {.n_tokens = 1,
                            .n_seqs = 2,
                            .position = position + t,
                            .seq = seq + t,
                            .page_start = page_start,
                            .pages = pages};
        struct attention_args a1 = {&one, H, KVH, D, a.scale, q + t * H * D, &kv, again + t * H * D, NULL};
        ops_attention(&c, &a1);
    }
    assert_memory_equal(out, again, T * H * D * 4);
    close_ctx(&c);
    free(k), free(v), free(q), free(out), free(again), free(kp), free(vp);
}

// Quantised and half weights: whatever dtype_to_f32 makes of random bytes times the rounded activations, under f32's
// bound; embed gives exactly those values. Bytes that would be a scale of Inf or NaN are avoided by clearing the
// exponents' top bits.
static void test_other_weights(void **state) {
    (void)state;
    static const enum dtype types[] = {DTYPE_F16,  DTYPE_Q8_0, DTYPE_Q4_0, DTYPE_Q4_1, DTYPE_Q5_0, DTYPE_Q5_1,
                                       DTYPE_Q2_K, DTYPE_Q3_K, DTYPE_Q4_K, DTYPE_Q5_K, DTYPE_Q6_K};
    enum { N_IN = 256, N_OUT = 19, T = 3 };
    float *x = random_floats(T * N_IN, 1.0f, 71);
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        struct matrix w = {"w", types[i], N_OUT, N_IN, 0, NULL, NULL};
        assert_true(dtype_row_bytes(w.type, N_IN, &w.row_bytes));
        unsigned char *data = checked_alloc(N_OUT, w.row_bytes);
        uint32_t rng = (uint32_t)i + 5;
        for (size_t b = 0; b < N_OUT * w.row_bytes; b++) uniform(&rng), data[b] = (unsigned char)((rng >> 16) & 0xBFu);
        w.data = data;
        float values[N_OUT * N_IN], y[T * N_OUT], rows[2 * N_IN];
        for (size_t o = 0; o < N_OUT; o++) dtype_to_f32(w.type, data + o * w.row_bytes, values + o * N_IN, N_IN);
        struct op_ctx c = open_portable(2);
        const int32_t token[] = {18, 4};
        c.ops->embed(&c, rows, &w, token, 2);
        assert_memory_equal(rows, values + 18 * N_IN, N_IN * sizeof(float));
        assert_memory_equal(rows + N_IN, values + 4 * N_IN, N_IN * sizeof(float));
        c.ops->matmul(&c, y, x, &w, T);
        // Of a group: two products and a fma for its scale, as many for its minimum, and a rounding in dtype_to_f32.
        // The parts of scale * u + min may be larger than their sum.
        float scale[N_IN / 16], min[N_IN / 16] = {0};
        int8_t q[N_IN];
        size_t len = w.type == DTYPE_F16 ? 16 : dtype_group_len(w.type);
        for (size_t j = 0; j < T * N_OUT; j++) {
            double sum = 0, size = 0, rounded[N_IN];
            const float *row = values + j % N_OUT * N_IN;
            ops_round_activation(w.type, x + j / N_OUT * N_IN, rounded, N_IN);
            if (w.type != DTYPE_F16) dtype_to_groups(w.type, data + j % N_OUT * w.row_bytes, q, scale, min, N_IN);
            for (size_t k = 0; k < N_IN; k++) {
                double part = w.type == DTYPE_F16 ? 0 : fabs((double)min[k / len]);
                sum += rounded[k] * (double)row[k];
                size += fabs(rounded[k]) * (fabs((double)row[k]) + 2 * part);
            }
            assert_true(isfinite(size) && size > 0);
            assert_true(fabs((double)y[j] - sum) <= (N_IN / 16 * 2 + 5) * U * size);
        }
        close_ctx(&c);
        free(data);
    }
    free(x);
}

// Half-split pairs: channel c turns with channel c + head_dim / 2, each result one product and one fma.
static void test_rope(void **state) {
    (void)state;
    enum { T = 5, H = 3, D = 80 };
    float *x = random_floats(T * H * D, 4.0f, 31), before[T * H * D], cos_sin[T * D];
    memcpy(before, x, sizeof before);
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < D / 2; i++) {
            double angle = (100 + t) * pow(1e6, -2.0 * i / D);
            cos_sin[t * D + i] = (float)cos(angle);
            cos_sin[t * D + D / 2 + i] = (float)sin(angle);
        }
    }
    struct op_ctx c = open_portable(2);
    c.ops->rope(&c, x, cos_sin, T, H, D);
    for (int i = 0; i < T * H * D; i++) {
        int t = i / (H * D), channel = i % D, pair = channel % (D / 2), base = i - channel;
        double lo = (double)before[base + pair], hi = (double)before[base + D / 2 + pair];
        double co = (double)cos_sin[t * D + pair], si = (double)cos_sin[t * D + D / 2 + pair];
        double first = channel < D / 2 ? lo * co : hi * co, second = channel < D / 2 ? -hi * si : lo * si;
        assert_true(fabs((double)x[i] - (first + second)) <= 2 * U * (fabs(first) + fabs(second)));
    }
    close_ctx(&c);
    free(x);
}

static void test_silu_mul(void **state) {
    (void)state;
    enum { N = 3001 };
    float *gate = random_floats(N, 90.0f, 41), *up = random_floats(N, 100.0f, 42), act[N];
    gate[0] = 0.0f;
    gate[1] = -1000.0f;
    struct op_ctx c = open_portable(3);
    c.ops->silu_mul(&c, act, gate, up, N);
    for (int i = 0; i < N; i++) {
        double e = (double)gate[i] / (1 + exp(-(double)gate[i])) * (double)up[i];
        // exp32 (2 U), the addition, the division, the product; where exp(-g) overflows the result is 0 instead
        double lost = gate[i] < -88.7f ? fabs((double)gate[i] * (double)up[i]) * 0x1p-127 : 0x1p-140;
        assert_true(fabs((double)act[i] - e) <= 6 * U * fabs(e) + lost);
    }
    c.ops->silu_mul(&c, gate, gate, up, N); // act may be gate
    assert_memory_equal(gate, act, sizeof act);
    close_ctx(&c);
    free(gate);
    free(up);
}

// bias, add and gather round at most once: exact equality with the plain expression. head_rmsnorm is rmsnorm by head.
static void test_plain(void **state) {
    (void)state;
    enum { T = 7, H = 3, D = 96, N = H * D };
    float *x = random_floats(T * N, 3.0f, 51), *b = random_floats(T * N, 3.0f, 52), y[T * N], z[T * N];
    struct op_ctx c = open_portable(2);
    memcpy(y, x, sizeof y);
    c.ops->bias(&c, y, b, T, N);
    for (int i = 0; i < T * N; i++) assert_true(y[i] == x[i] + b[i % N]);
    memcpy(y, x, sizeof y);
    c.ops->add(&c, y, b, T * N);
    for (int i = 0; i < T * N; i++) assert_true(y[i] == x[i] + b[i]);
    const int32_t rows[] = {6, 0, 6};
    c.ops->gather(&c, y, x, rows, 3, N);
    assert_memory_equal(y, x + 6 * N, N * sizeof(float));
    assert_memory_equal(y + N, x, N * sizeof(float));
    assert_memory_equal(y + 2 * N, x + 6 * N, N * sizeof(float));
    memcpy(y, x, sizeof y);
    c.ops->head_rmsnorm(&c, y, b, 1e-6f, T, H, D);
    c.ops->rmsnorm(&c, z, x, b, 1e-6f, T * H, D);
    assert_memory_equal(y, z, sizeof y);
    close_ctx(&c);
    free(x);
    free(b);
}

// bf16 KV: each value rounded once, in its own slot; every other slot keeps what it held.
static void test_kv_store(void **state) {
    (void)state;
    enum { KVH = 2, D = 64, T = 3, PAGES = 3, SLOTS = PAGES * KVH * KV_PAGE_TOKENS * D };
    static uint16_t kp[SLOTS], vp[SLOTS];
    memset(kp, 0xFF, sizeof kp);
    memset(vp, 0xFF, sizeof vp);
    float *k = random_floats(T * KVH * D, 1.0f, 61), *v = random_floats(T * KVH * D, 1.0f, 62);
    const int32_t position[] = {31, 32, 5}, seq[] = {0, 0, 1}, page_start[] = {0, 2, 3}, pages[] = {2, 0, 1};
    struct batch b = {
        .n_tokens = T, .n_seqs = 2, .position = position, .seq = seq, .page_start = page_start, .pages = pages};
    struct kv_layer kv = {DTYPE_BF16, kp, vp, PAGES, KVH, D};
    struct op_ctx c = open_portable(2);
    c.ops->kv_store(&c, &kv, &b, k, v);
    const size_t page[] = {2, 0, 1}, slot[] = {31, 0, 5};
    size_t written = 0;
    for (size_t i = 0; i < T * KVH * D; i++) {
        size_t t = i / (KVH * D), h = i / D % KVH;
        size_t at = ((page[t] * KVH + h) * KV_PAGE_TOKENS + slot[t]) * D + i % D;
        assert_int_equal(kp[at], bf16_from_f32(k[i]));
        assert_int_equal(vp[at], bf16_from_f32(v[i]));
    }
    for (size_t i = 0; i < SLOTS; i++) written += (size_t)((kp[i] != 0xFFFF) + (vp[i] != 0xFFFF));
    assert_int_equal(written, 2 * T * KVH * D);
    close_ctx(&c);
    free(k);
    free(v);
}

// Q8_0: the scale and the integers of the definition, computed here in f64; the error that they leave.
static void test_kv_round_q8_0(void **state) {
    (void)state;
    enum { N = 64 };
    for (uint32_t seed = 1; seed < 400; seed++) {
        float *x = random_floats(N, exp2f((float)(seed % 37) - 22.0f), seed), back[N];
        unsigned char row[N / 32 * 34 + 1];
        row[sizeof row - 1] = 0xA5;
        assert_int_equal(kv_bytes(DTYPE_Q8_0, N), sizeof row - 1);
        kv_round(DTYPE_Q8_0, x, row, N);
        assert_int_equal(row[sizeof row - 1], 0xA5);
        dtype_to_f32(DTYPE_Q8_0, row, back, N);
        for (size_t b = 0; b < N; b += 32) {
            double most = 0;
            for (size_t i = b; i < b + 32; i++) most = fmax(most, fabs((double)x[i]));
            // f16 next to most / 127: 11 bits, or a multiple of 2^-24.
            double step = exp2(fmax(floor(log2(most / 127)) - 10, -24)), d = nearbyint(most / 127 / step) * step;
            uint16_t half;
            memcpy(&half, row + b / 32 * 34, 2);
            assert_true(fabs((double)f16_to_f32(half) - d) <= 0.002 * step); // most / 127 is f32 there
            for (size_t i = b; i < b + 32; i++) {
                assert_true(kv_channel(DTYPE_Q8_0, row, i) == back[i]);
                assert_true(fabs((double)(int8_t)row[b / 32 * 34 + 2 + i - b]) <= 127);
                double edge = fmax(0, fabs((double)x[i]) - 127 * d); // where d was rounded down
                assert_true(fabs((double)back[i] - (double)x[i]) <= 0.5001 * d + edge + most * 1e-6);
            }
        }
        kv_as_stored(DTYPE_Q8_0, x, x, N);
        assert_memory_equal(x, back, sizeof back);
        free(x);
    }
}

// A row is found again as it was rounded, and no other row's bytes change, whatever the type deals out.
static void test_kv_rows(void **state) {
    (void)state;
    enum { D = 64, PAGES = 2, HEADS = 3, ROWS = PAGES * HEADS * KV_PAGE_TOKENS };
    static const enum dtype types[] = {DTYPE_BF16, DTYPE_F16, DTYPE_F32, DTYPE_Q8_0};
    static unsigned char k[ROWS * D * 4], v[sizeof k], before[sizeof k];
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        struct kv_layer kv = {types[i], k, v, PAGES, HEADS, D};
        float *x = random_floats(ROWS * D, 2.0f, 71), back[D];
        for (size_t row = 0; row < ROWS; row++) {
            for (int side = KV_K; side <= KV_V; side++) {
                unsigned char want[4 * D], found[4 * D], *data = side == KV_K ? k : v;
                size_t changed = 0;
                memcpy(before, data, sizeof before);
                kv_store_row(&kv, (enum kv_side)side, row, x + row * D);
                kv_round(types[i], x + row * D, want, D);
                kv_read(&kv, (enum kv_side)side, data, row, found);
                assert_memory_equal(want, found, kv_row_bytes(&kv));
                dtype_to_f32(types[i], want, back, D);
                for (size_t c = 0; c < D; c++) assert_true(kv_value(&kv, (enum kv_side)side, data, row, c) == back[c]);
                for (size_t b = 0; b < sizeof k; b++) changed += data[b] != before[b];
                assert_true(changed > 0 && changed <= kv_row_bytes(&kv));
                for (size_t other = 0; other < ROWS; other++)
                    assert_true(kv_same_row(&kv, (enum kv_side)side, data, before, other) == (other != row));
            }
        }
        assert_int_equal(kv_row(&kv, 1, 2, 5), (1 * HEADS + 2) * KV_PAGE_TOKENS + 5);
        free(x);
    }
}

// What cannot be stored shows: its whole block becomes NaN, and nothing else. What is next to zero becomes zero.
static void test_kv_round_extremes(void **state) {
    (void)state;
    const float odd[] = {NAN, INFINITY, -INFINITY, 8.4e6f, -3e38f};
    float back[64], x[64];
    for (size_t k = 0; k < sizeof odd / sizeof *odd; k++) {
        for (size_t i = 0; i < 64; i++) x[i] = (float)i - 31.5f;
        x[40] = odd[k];
        kv_as_stored(DTYPE_Q8_0, x, back, 64);
        for (size_t i = 0; i < 32; i++) assert_true(fabsf(back[i] - x[i]) < 0.14f);
        for (size_t i = 32; i < 64; i++) assert_true(isnan(back[i]));
    }
    for (size_t i = 0; i < 32; i++) x[i] = 2e-7f * ((float)i - 16);
    kv_as_stored(DTYPE_Q8_0, x, back, 32);
    for (size_t i = 0; i < 32; i++) assert_true(back[i] == 0.0f);
    for (size_t i = 0; i < 32; i++) x[i] = (float)(i % 3) * 4.1e6f; // the largest that a block holds
    kv_as_stored(DTYPE_Q8_0, x, back, 32);
    for (size_t i = 0; i < 32; i++) assert_true(fabsf(back[i] - x[i]) < 4e4f);
}

// The E4M3 nearest to v, ties to even, by trying all 256.
static double nearest_e4m3(double v) {
    double best = 0, error = INFINITY;
    for (int i = 0; i < 127; i++) { // 127 would be NaN
        double x = i < 8 ? i * exp2(-9) : (8 + i % 8) * exp2(i / 8 - 10), d = fabs(fabs(v) - x);
        if (d < error || (d <= error && i % 2 == 0)) best = x, error = d;
    }
    return copysign(best, v);
}

// FP8: the smallest scale that holds the block's largest magnitude, and the nearest numbers of that scale.
static void test_kv_round_fp8(void **state) {
    (void)state;
    enum { N = 64 };
    for (uint32_t seed = 1; seed < 400; seed++) {
        float *x = random_floats(N, exp2f((float)(seed % 37) - 22.0f), seed), back[N];
        unsigned char row[N / 32 * 33 + 1];
        if (seed % 5 == 0)
            for (size_t i = 0; i < N; i++) x[i] *= exp2f(-(float)(i % 24)); // far below the largest too
        if (seed % 7 == 0) x[3] = exp2f((float)(seed % 11)) * 448.0f / 512.0f, x[4] = -1.001f * x[3];
        row[sizeof row - 1] = 0xA5;
        assert_int_equal(kv_bytes(DTYPE_FP8, N), sizeof row - 1);
        kv_round(DTYPE_FP8, x, row, N);
        assert_int_equal(row[sizeof row - 1], 0xA5);
        dtype_to_f32(DTYPE_FP8, row, back, N);
        for (size_t b = 0; b < N; b += 32) {
            double most = 0;
            for (size_t i = b; i < b + 32; i++) most = fmax(most, fabs((double)x[i]));
            double scale = exp2(fmax(ceil(log2(most / 448)), -100));
            assert_int_equal(row[b / 32 * 33], (int)log2(scale) + 247);
            for (size_t i = b; i < b + 32; i++) {
                assert_true(kv_channel(DTYPE_FP8, row, i) == back[i]);
                assert_true((double)back[i] == nearest_e4m3((double)x[i] / scale) * scale);
            }
        }
        kv_as_stored(DTYPE_FP8, x, x, N);
        assert_memory_equal(x, back, sizeof back);
        free(x);
    }
}

static void test_kv_round_fp8_extremes(void **state) {
    (void)state;
    const float odd[] = {NAN, INFINITY, -INFINITY, 57345.0f, -3e38f};
    float back[64], x[64];
    for (size_t k = 0; k < sizeof odd / sizeof *odd; k++) {
        for (size_t i = 0; i < 64; i++) x[i] = (float)i - 31.5f;
        x[40] = odd[k];
        kv_as_stored(DTYPE_FP8, x, back, 64);
        for (size_t i = 0; i < 32; i++) assert_true(fabsf(back[i] - x[i]) <= fabsf(x[i]) / 16);
        for (size_t i = 32; i < 64; i++) assert_true(isnan(back[i]));
    }
    for (size_t i = 0; i < 32; i++) x[i] = i % 2 ? 57344.0f : -1e-30f; // the largest that a block holds
    kv_as_stored(DTYPE_FP8, x, back, 32);
    for (size_t i = 0; i < 32; i++) assert_true(back[i] == (i % 2 ? 57344.0f : 0.0f));
    for (size_t i = 0; i < 32; i++) x[i] = i % 2 ? 1e-42f : 0.0f; // subnormal
    kv_as_stored(DTYPE_FP8, x, back, 32);
    for (size_t i = 0; i < 32; i++) assert_true(back[i] == 0.0f);
}

static void test_kv_types(void **state) {
    (void)state;
    enum dtype type;
    struct error err = {0};
    const struct {
        const char *name;
        enum dtype type;
    } known[] = {{NULL, DTYPE_BF16}, {"bf16", DTYPE_BF16}, {"f16", DTYPE_F16},
                 {"f32", DTYPE_F32}, {"q8_0", DTYPE_Q8_0}, {"fp8", DTYPE_FP8}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        assert_true(kv_type_parse(known[i].name, &type, &err));
        assert_int_equal(type, known[i].type);
    }
    const char *const unknown[] = {"", "q4_0", "q8", "bf16 ", "bool"};
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        assert_false(kv_type_parse(unknown[i], &type, &err));
        assert_non_null(strstr(err.text, unknown[i]));
        assert_non_null(strstr(err.text, "q8_0"));
    }
    assert_true(kv_type_fits(DTYPE_Q8_0, 96, NULL, &err) && kv_type_fits(DTYPE_F16, 20, NULL, &err));
    assert_false(kv_type_fits(DTYPE_Q8_0, 80, NULL, &err));
    assert_non_null(strstr(err.text, "80"));
    // A device stores some.
    struct device d = {.name = "a device", .kv_types = 1u << DTYPE_BF16 | 1u << DTYPE_FP8};
    assert_true(kv_type_fits(DTYPE_BF16, 96, &d, &err) && kv_type_fits(DTYPE_FP8, 96, &d, &err));
    assert_false(kv_type_fits(DTYPE_Q8_0, 96, &d, &err));
    assert_string_equal(err.text, "KV type: a device stores K and V as BF16 or FP8, Q8_0 was asked for");
}

// A token at position 8,191 over equal keys averages the values; one key that stands out takes nearly all.
static void test_long_attention(void **state) {
    (void)state;
    enum { D = 64, N = 8192, PAGES = N / KV_PAGE_TOKENS };
    uint16_t *kp = checked_alloc(N * D, 2), *vp = checked_alloc(N * D, 2);
    int32_t pages[PAGES], position = N - 1, seq = 0, page_start[] = {0, PAGES};
    for (int i = 0; i < PAGES; i++) pages[i] = PAGES - 1 - i;
    for (size_t i = 0; i < N * D; i++) vp[i] = bf16_from_f32(1.0f);
    float q[D], out[D];
    for (int i = 0; i < D; i++) q[i] = 8.0f;
    struct batch b = {
        .n_tokens = 1, .n_seqs = 1, .position = &position, .seq = &seq, .page_start = page_start, .pages = pages};
    struct kv_layer kv = {DTYPE_BF16, kp, vp, PAGES, 1, D};
    struct attention_args a = {&b, 1, 1, D, 0.125f, q, &kv, out, NULL};
    struct op_ctx c = open_ctx(ops_cpu("portable", NULL), (struct ops_limits){1, N, D, 1, D, 2}, 0);
    ops_attention(&c, &a);
    for (int i = 0; i < D; i++) assert_true(out[i] == 1.0f); // equal weights: powers of two, no rounding at all
    size_t odd = 5000;                                       // in page PAGES - 1 - 156, slot 8
    size_t at = (size_t)pages[odd / KV_PAGE_TOKENS] * KV_PAGE_TOKENS * D + odd % KV_PAGE_TOKENS * D;
    for (size_t i = 0; i < D; i++) kp[at + i] = bf16_from_f32(0.5f), vp[at + i] = bf16_from_f32(-3.0f);
    ops_attention(&c, &a); // its score: 64 * 8 * 0.5 / 8 = 32
    double rest = (N - 1) * exp(-32.0), expected = (-3 + rest) / (1 + rest);
    for (int i = 0; i < D; i++) assert_true(fabs((double)out[i] - expected) <= 8 * U * 3);
    close_ctx(&c);
    free(kp);
    free(vp);
}

static void test_fusion_text(void **state) {
    (void)state;
    uint32_t mask = 0;
    char text[256];
    struct error err;
    assert_true(fusion_parse("norm_qkv,attention", &mask, NULL));
    assert_int_equal(mask, 1u << FUSED_NORM_QKV | 1u << FUSED_ATTENTION);
    assert_string_equal(fusion_text(mask, text, sizeof text), "norm_qkv,attention");
    assert_true(fusion_parse("on", &mask, NULL) && mask == (1u << FUSED_COUNT) - 1);
    assert_string_equal(fusion_text(mask, text, sizeof text), "on");
    assert_true(fusion_parse("off", &mask, NULL) && mask == 0);
    mask = 5;
    assert_false(fusion_parse("norm_qkv,", &mask, &err));
    assert_false(fusion_parse("norm", &mask, &err) || mask != 5);
    assert_non_null(strstr(err.text, "down_residual"));
    assert_null(ops_cpu("mmx", &err));
    assert_non_null(strstr(err.text, "portable"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exp32),
        cmocka_unit_test(test_dot16_order),
        cmocka_unit_test(test_dotpair_order),
        cmocka_unit_test(test_round_activation),
        cmocka_unit_test(test_matmul),
        cmocka_unit_test(test_other_weights),
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_silu_mul),
        cmocka_unit_test(test_plain),
        cmocka_unit_test(test_kv_store),
        cmocka_unit_test(test_kv_round_q8_0),
        cmocka_unit_test(test_kv_round_extremes),
        cmocka_unit_test(test_kv_round_fp8),
        cmocka_unit_test(test_kv_round_fp8_extremes),
        cmocka_unit_test(test_kv_rows),
        cmocka_unit_test(test_kv_types),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_long_attention),
        cmocka_unit_test(test_fusion_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
