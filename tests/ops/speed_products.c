// speed_products.c: how fast matrix products and attention are, per instruction set, weight type and number of tokens,
// next to the read bandwidth of the same run, and with --peak to the rates of loops of nothing but multiplications. It
// measures; the other files here judge. Every round runs every case
// once, so that a busy neighbour slows them alike; printed are medians, or with --best the best.
//
//   speed_products [--isa avx2,portable] [--threads N] [--types bf16,q8_0] [--tokens 1,8,64] [--rounds N]
//                  [--columns 1024] [--mib 96] [--attention 512,4096] [--kv bf16,q8_0]
//                  [--clock wall|cpu] [--octets on|off] [--peak on|off] [--best on|off]
#include "base/clock.h"
#include "base/size.h"
#include "format/octets.h"
#include "ops/kv_page.h"
#include "ops/ops.h"

#include <inttypes.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static bool cpu_time; // one thread on a busy machine: its own time instead of the clock's
static bool best;     // the best round in place of the median

static double now(void) {
    struct timespec t;
    if (!cpu_time) return clock_seconds();
    return clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t) == 0 ? (double)t.tv_sec + 1e-9 * (double)t.tv_nsec : 0;
}

enum { MAX_CASES = 256, MAX_ROUNDS = 51, MAX_LIST = 16 };

struct list {
    size_t n;
    char text[MAX_LIST][16];
};

static struct list split(const char *text) {
    struct list l = {0};
    while (*text && l.n < MAX_LIST) {
        size_t n = strcspn(text, ",");
        snprintf(l.text[l.n++], sizeof l.text[0], "%.*s", (int)n, text);
        text += n + (text[n] == ',');
    }
    return l;
}

struct reading {
    const uint64_t *words;
    atomic_uint_fast64_t sum;
};

static void read_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    struct reading *r = user;
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = begin * 8; i + 4 <= end * 8; i += 4)
        a += r->words[i], b += r->words[i + 1], c += r->words[i + 2], d += r->words[i + 3];
    atomic_fetch_add(&r->sum, a + b + c + d);
}

// ---- The arithmetic's limit: 256-bit multiplications and additions of registers, with as many chains as fill the
// pipes

enum { PEAKS = 3, PEAK_STEPS = 40000, PEAK_PIECES = 16 };

static const struct {
    const char *name;
    double ops; // of a step
} peaks[PEAKS] = {{"fma", 12 * 16}, {"vpmaddwd and vpaddd", 8 * 32}, {"vpmaddubsw and vpaddw", 8 * 64}};

#if defined(__x86_64__)
#define ZERO(i) "vpxor %%ymm" #i ", %%ymm" #i ", %%ymm" #i "\n"
#define FMA(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n"
#define MADD(i, p) "vpmaddwd %%ymm14, %%ymm15, %%ymm" #p "\n vpaddd %%ymm" #p ", %%ymm" #i ", %%ymm" #i "\n"
#define BYTES(i, p) "vpmaddubsw %%ymm14, %%ymm15, %%ymm" #p "\n vpaddw %%ymm" #p ", %%ymm" #i ", %%ymm" #i "\n"
#define EACH(M) M(0, 8) M(1, 9) M(2, 10) M(3, 11) M(4, 12) M(5, 13) M(6, 8) M(7, 9)
#define LOOP(steps)                                                                                                    \
    __asm__ volatile(ZERO(0) ZERO(1) ZERO(2) ZERO(3) ZERO(4) ZERO(5) ZERO(6) ZERO(7) ZERO(8) ZERO(9) ZERO(10) ZERO(11) \
                         ZERO(14) ZERO(15) "mov %0, %%ecx\n 1:\n" steps                                                \
                                           "sub $1, %%ecx\n jnz 1b\n vzeroupper\n" ::"i"(PEAK_STEPS)                   \
                     : "ecx", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
                       "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")

static void peak_piece(void *user, size_t begin, size_t end, int thread) {
    (void)thread;
    for (size_t i = begin; i < end; i++) {
        if (*(const size_t *)user == 0)
            LOOP(FMA(0) FMA(1) FMA(2) FMA(3) FMA(4) FMA(5) FMA(6) FMA(7) FMA(8) FMA(9) FMA(10) FMA(11));
        else if (*(const size_t *)user == 1) LOOP(EACH(MADD));
        else LOOP(EACH(BYTES));
    }
}

// Seconds; 0: not on this CPU.
static double peak(struct pool *pool, size_t which) {
    double start = now();
    if (!ops_cpu("avx2", NULL)) return 0;
    pool_for(pool, PEAK_PIECES, 1, peak_piece, &which);
    return now() - start;
}
#else
static double peak(struct pool *pool, size_t which) {
    (void)pool, (void)which;
    return 0;
}
#endif

struct measured {
    const char *isa;
    enum dtype type;
    size_t n_tokens, depth; // depth: attention over so many positions, else a product
    struct matrix w;
    double seconds[MAX_ROUNDS];
};

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double typical(double *v, size_t n) {
    qsort(v, n, sizeof *v, by_value);
    if (best) return v[0];
    return n % 2 ? v[n / 2] : 0.5 * (v[n / 2 - 1] + v[n / 2]);
}

static void *or_die(void *p) {
    if (p) return p;
    fputs("out of memory\n", stderr);
    exit(1);
}

// Bytes whose block scales are finite and whose BF16 values are normal (Intel's CPUs slow down a hundredfold on
// others), whatever the type.
static void fill(unsigned char *data, size_t n) {
    uint64_t state = 7;
    for (size_t i = 0; i + 8 <= n; i += 8) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        uint64_t v = (state ^ state >> 29) & UINT64_C(0xBBBBBBBBBBBBBBBB);
        v |= UINT64_C(0x2000200020002000);
        memcpy(data + i, &v, 8);
    }
}

static double run_product(const struct op_ctx *ctx, float *y, const float *x, const struct matrix *w, size_t n_tokens) {
    double start = now();
    ctx->ops->matmul(ctx, y, x, w, n_tokens);
    return now() - start;
}

enum { HEADS = 16, KV_HEADS = 8, HEAD_DIM = 128 };

static double run_attention(const struct op_ctx *ctx, float *out, const float *q, const void *memory, size_t depth,
                            enum dtype type) {
    enum { MAX_PAGES = 4096 };
    static int32_t pages[MAX_PAGES];
    size_t n_pages = (depth + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    if (n_pages > MAX_PAGES) n_pages = MAX_PAGES;
    for (size_t i = 0; i < n_pages; i++) pages[i] = (int32_t)i;
    int32_t position = (int32_t)(depth - 1), seq = 0, page_start[] = {0, (int32_t)n_pages};
    struct batch b = {
        .n_tokens = 1, .n_seqs = 1, .position = &position, .seq = &seq, .page_start = page_start, .pages = pages};
    size_t bytes = n_pages * KV_HEADS * KV_PAGE_TOKENS * kv_bytes(type, HEAD_DIM);
    struct kv_layer kv = {.type = type,
                          .k = (void *)(uintptr_t)memory,
                          .v = (char *)(uintptr_t)memory + bytes,
                          .n_pages = n_pages,
                          .n_kv_heads = KV_HEADS,
                          .head_dim = HEAD_DIM};
    struct attention_args a = {.batch = &b,
                               .n_heads = HEADS,
                               .n_kv_heads = KV_HEADS,
                               .head_dim = HEAD_DIM,
                               .scale = 0.09f,
                               .q = q,
                               .kv = &kv,
                               .out = out};
    double start = now();
    ops_attention(ctx, &a);
    return now() - start;
}

int main(int argc, char **argv) {
    struct list isas = split("auto"), types = split("bf16,q8_0,q4_0,q4_k,q6_k"), tokens = split("1,2,4,8,16,64,256"),
                depths = split(""), kvs = split("bf16");
    int n_threads = 0;
    size_t n_rounds = 5, n_in = 1024, mib = 96;
    bool octets = false, with_peak = false; // octets: any bytes are as good as packed ones
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--isa") == 0) isas = split(argv[i + 1]);
        else if (strcmp(argv[i], "--types") == 0) types = split(argv[i + 1]);
        else if (strcmp(argv[i], "--tokens") == 0) tokens = split(argv[i + 1]);
        else if (strcmp(argv[i], "--attention") == 0) depths = split(argv[i + 1]);
        else if (strcmp(argv[i], "--kv") == 0) kvs = split(argv[i + 1]);
        else if (strcmp(argv[i], "--threads") == 0) n_threads = atoi(argv[i + 1]);
        else if (strcmp(argv[i], "--rounds") == 0) n_rounds = strtoul(argv[i + 1], NULL, 10);
        else if (strcmp(argv[i], "--columns") == 0) n_in = strtoul(argv[i + 1], NULL, 10);
        else if (strcmp(argv[i], "--clock") == 0) cpu_time = strcmp(argv[i + 1], "cpu") == 0;
        else if (strcmp(argv[i], "--octets") == 0) octets = strcmp(argv[i + 1], "on") == 0;
        else if (strcmp(argv[i], "--peak") == 0) with_peak = strcmp(argv[i + 1], "on") == 0;
        else if (strcmp(argv[i], "--best") == 0) best = strcmp(argv[i + 1], "on") == 0;
        else if (strcmp(argv[i], "--mib") == 0) mib = strtoul(argv[i + 1], NULL, 10);
        else return fprintf(stderr, "unknown option %s\n", argv[i]), 2;
    }
    if (n_rounds == 0 || n_rounds > MAX_ROUNDS) return fprintf(stderr, "--rounds: 1 to %d\n", MAX_ROUNDS), 2;
    struct error err = {0};
    struct pool *pool = pool_create(n_threads, &err);
    size_t bytes = mib << 20, max_tokens = 1, max_depth = 0;
    unsigned char *memory = or_die(size_alloc_aligned(bytes, 1));
    fill(memory, bytes);
    static struct measured cases[MAX_CASES];
    size_t n_cases = 0;
    for (size_t i = 0; i < isas.n; i++) {
        for (size_t d = 0; d < depths.n * kvs.n && n_cases < MAX_CASES; d++) {
            size_t depth = strtoul(depths.text[d / kvs.n], NULL, 10);
            enum dtype type;
            if (!kv_type_parse(kvs.text[d % kvs.n], &type, &err)) return fprintf(stderr, "%s\n", err.text), 2;
            cases[n_cases++] = (struct measured){.isa = isas.text[i], .type = type, .n_tokens = 1, .depth = depth};
            if (depth > max_depth) max_depth = depth;
        }
        for (size_t t = 0; t < types.n; t++) {
            enum dtype type;
            size_t row_bytes;
            if (!dtype_from_name(types.text[t], &type) || !dtype_row_bytes(type, n_in, &row_bytes))
                return fprintf(stderr, "no rows of %zu %s\n", n_in, types.text[t]), 2;
            for (size_t k = 0; k < tokens.n && n_cases < MAX_CASES; k++) {
                size_t n = strtoul(tokens.text[k], NULL, 10), n_out = bytes / row_bytes;
                if (n > 32 && n_out > 8192) n_out = 8192; // long enough without
                const unsigned char *packed = octets && octets_known(type) ? memory : NULL;
                struct matrix w = {"w", type, n_out, n_in, row_bytes, memory, packed};
                cases[n_cases++] = (struct measured){isas.text[i], type, n, 0, w, {0}};
                if (n > max_tokens) max_tokens = n;
            }
        }
    }
    size_t n_out = bytes, width = n_in > HEADS * HEAD_DIM ? n_in : HEADS * HEAD_DIM;
    n_out = bytes / (n_in / 2);
    struct op_ctx ctx = {.pool = pool, .fusion = UINT32_MAX};
    struct ops_limits limits = {max_tokens, max_depth, width, HEADS, HEAD_DIM, pool_size(pool)};
    size_t y_floats = (max_tokens > 32 ? 32 * n_out : max_tokens * n_out) + max_tokens * 8192;
    if (!ops_scratch_floats(&limits, &ctx.scratch_floats)) return 1;
    ctx.scratch = or_die(size_alloc_aligned(ctx.scratch_floats, sizeof(float)));
    float *x = or_die(size_alloc_aligned(max_tokens * width, sizeof *x)), *y = or_die(size_alloc(y_floats, sizeof *y));
    for (size_t i = 0; i < max_tokens * width; i++) x[i] = (float)sin((double)i);
    memset(y, 0, y_floats * sizeof *y);
    static double reading[MAX_ROUNDS], rates[PEAKS][MAX_ROUNDS];
    for (size_t r = 0; r < n_rounds; r++) {
        struct reading job = {.words = (const uint64_t *)(const void *)memory};
        double start = now();
        pool_for(pool, bytes / 64, bytes / 64 / 64, read_piece, &job);
        reading[r] = now() - start;
        for (size_t i = 0; with_peak && i < PEAKS; i++) rates[i][r] = peak(pool, i);
        for (size_t c = 0; c < n_cases; c++) {
            ctx.ops = ops_cpu(cases[c].isa, &err);
            if (!ctx.ops) continue;
            cases[c].seconds[r] = cases[c].depth ? run_attention(&ctx, y, x, memory, cases[c].depth, cases[c].type)
                                                 : run_product(&ctx, y, x, &cases[c].w, cases[c].n_tokens);
        }
    }
    double bandwidth = (double)bytes / typical(reading, n_rounds);
    printf("%d threads, read bandwidth %.1f GB/s, %s of %zu rounds\n", pool_size(pool), bandwidth * 1e-9,
           best ? "the best" : "medians", n_rounds);
    for (size_t i = 0; with_peak && i < PEAKS; i++)
        printf("%-22s %7.1f Gop/s\n", peaks[i].name,
               peaks[i].ops * PEAK_STEPS * PEAK_PIECES / typical(rates[i], n_rounds) * 1e-9);
    for (size_t c = 0; c < n_cases; c++) {
        struct measured *m = &cases[c];
        if (!ops_cpu(m->isa, &err)) {
            if (c == 0 || m->isa != cases[c - 1].isa) printf("%-12s %s\n", m->isa, err.text);
            continue;
        }
        double s = typical(m->seconds, n_rounds);
        if (m->depth) {
            double kv = 2.0 * (double)m->depth * KV_HEADS * (double)kv_bytes(m->type, HEAD_DIM);
            printf("%-12s %-5s attention, depth %5zu %9.3f ms  %6.1f GB/s  %5.1f%% of bandwidth\n", m->isa,
                   dtype_info(m->type)->name, m->depth, s * 1e3, kv / s * 1e-9, 100 * kv / s / bandwidth);
            continue;
        }
        double weights = (double)m->w.n_out * (double)m->w.row_bytes;
        double ops = 2.0 * (double)m->w.n_out * (double)m->w.n_in * (double)m->n_tokens;
        printf("%-12s %-5s T %4zu %9.3f ms  %6.1f GB/s  %5.1f%% of bandwidth  %7.1f Gop/s\n", m->isa,
               dtype_info(m->type)->name, m->n_tokens, s * 1e3, weights / s * 1e-9, 100 * weights / s / bandwidth,
               ops / s * 1e-9);
    }
    pool_free(pool);
    free(memory), free(x), free(y), free(ctx.scratch);
    return 0;
}
