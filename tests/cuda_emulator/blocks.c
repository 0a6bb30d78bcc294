// blocks.c: one block of threads: fibers, the places where they wait for each other, copies into shared memory. Where a
// thread waits, another goes on that a random number chooses.
#include "internal.h"

#include <link.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// As kernels know them (cuda_bf16.h), which C does not include.
struct emulated_place {
    dim3 thread, block, block_size, grid_size;
} emulated_place;
unsigned char *emulated_dynamic_shared(void);
void emulated_syncthreads(void);
void emulated_syncwarp(void);
uint64_t emulated_shuffle(uint64_t v, unsigned lane);
bool emulated_vote_all(bool v);
void emulated_mma(float d[4], const uint32_t a[4], const uint32_t b[2]);
void emulated_dependency_wait(void);
void emulated_barrier_init(uint64_t *barrier, unsigned n_threads);
void emulated_barrier_arrive(uint64_t *barrier);
void emulated_barrier_expect(uint64_t *barrier, uint32_t bytes);
void emulated_barrier_await(uint64_t *barrier, uint32_t bytes);
void emulated_barrier_wait(uint64_t *barrier, uint32_t parity);
void emulated_bulk_copy(void *to, const void *from, uint32_t bytes, uint64_t *barrier);
void emulated_pause(void);
void emulated_spin(void);
void emulated_sync_some(int id, unsigned n);
unsigned emulated_cluster_rank(void);
void emulated_cluster_sync(void);
void emulated_push(void *at, const void *data, unsigned bytes, uint64_t *barrier, unsigned rank);
uint32_t emulated_shared_address(const void *p);
void emulated_group_fence(void);
void emulated_group_mma(float *d, int n, const uint32_t a[4], uint64_t b, bool across, bool add);
void emulated_load_staged(const void *at);
void emulated_group_commit(void);
void emulated_group_wait(int most);
void emulated_group_registers(int n);

int sown_mistake;

enum { STACK = 96 * 1024, GUARD = 4096, WARP = 32, MOST_WARPS = MOST_THREADS / WARP, MOST_COPIES = 4096 };
enum thread_state {
    RUNNING,
    READY,
    AT_BARRIER,
    AT_SOME,    // a barrier of some of the block's threads
    AT_CLUSTER, // the cluster's barrier
    IN_WARP,
    AT_COPY,
    AT_DEPENDENCY,
    SPINNING, // looks again at what another block writes
    ENDED,
    N_STATES
};
enum { MOST_SOME = 16, MOST_CHAINS = 8, MOST_STEPS = 16, MOST_COLUMNS = 256 };
enum instruction { SYNC_WARP, SHUFFLE, VOTE, MATRIX, GROUP_FENCE, GROUP_MATRIX, GROUP_COMMIT, GROUP_WAIT, REGISTERS };

struct fiber {
#if defined(__x86_64__)
    void *stack_pointer;
#else
    ucontext_t context;
#endif
    unsigned number;
    enum thread_state state;
    uint64_t *barrier; // AT_COPY: waits for this one's phase to differ from
    uint32_t parity;   // this
    int some;          // AT_SOME: of this number
};

// What a lane brings to an instruction of its whole warp.
struct share {
    uint32_t a[4], b[2];
    float d[4];
    float *to;   // of a group's instruction: its d,
    bool across; // and whether b's columns are beside each other
};

// Asynchronous matrix instructions of one warp on the same d, one after the other.
struct group_chain {
    float *to[WARP]; // each lane's d
    int n, n_steps;
    bool is_committed, at_once; // at_once: b is read when the instruction is issued, else when it is waited for
    struct {
        uint32_t a[WARP][4];
        uint64_t b;
        bool across;
    } steps[MOST_STEPS];
    float sums[16][MOST_COLUMNS];
};

// What a warp has issued of them and not yet waited for, oldest first.
struct group_warp {
    struct group_chain chains[MOST_CHAINS];
    int n_chains;
    bool is_fenced;
    unsigned n_issued; // since the block began
};

struct warp {
    unsigned arrived, met; // lanes that are here; instructions done
    enum instruction instruction;
    struct share shares[2][WARP]; // [met % 2]: the last instruction's stay until every lane has come to the next
};

struct copy {
    void *to;
    const void *from; // NULL: a push, of `data`
    uint32_t bytes;
    uint64_t *barrier;
    unsigned char data[16];
};

// What a thread has loaded from a stage, and no matrix instruction has taken yet.
enum { MOST_LOADS = 16, LOAD = 16 };
struct loads {
    unsigned n;
    struct {
        const void *at;
        unsigned char value[LOAD];
    } list[MOST_LOADS];
};

struct block {
    const struct kernel_node *kernel;
    dim3 index;
    unsigned n_threads, n_in[N_STATES];
    bool is_early, has_waited;
    bool copies_last; // only when no thread can go on
    unsigned choice;  // the next thread is one of so many that became ready last
    struct fiber outside, threads[MOST_THREADS], *current;
    uint16_t ready[MOST_THREADS]; // [n_in[READY]]
    struct warp warps[MOST_WARPS];
    struct group_warp groups[MOST_WARPS];
    struct loads loads[MOST_THREADS];
    struct copy copies[MOST_COPIES];
    unsigned n_copies;
    unsigned n_at_some[MOST_SOME];
    struct block **cluster; // its blocks; NULL: none
    unsigned rank, n_cluster;
    unsigned char *stacks;        // [MOST_THREADS][STACK], the lowest page of each a guard
    unsigned char *shared, *base; // dynamic shared memory, its end at a guard; the mapping
    unsigned char *statics;       // a suspended block's static shared memory
};

static struct block *now; // the block whose threads run
static size_t n_moves;    // of threads that waited and of pushes: that a grid does not hang

static unsigned below(unsigned n) {
    return (unsigned)((emulated_random() & 0xFFFFFFFFu) * n >> 32);
}

// ---- The program's static shared memory: this module's thread-local variables, of which it has no others ----------

struct module_memory {
    unsigned char *at;
    size_t bytes;
};

static int find_memory(struct dl_phdr_info *info, size_t size, void *user) {
    (void)size;
    struct module_memory *m = user;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
        m->at = info->dlpi_tls_data;
        m->bytes = info->dlpi_phdr[i].p_memsz;
    }
    return 1; // the program comes first
}

static struct module_memory statics(void) {
    struct module_memory m = {NULL, 0};
    dl_iterate_phdr(find_memory, &m);
    return m;
}

// ---- Switching ----------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
void emulated_switch(void **from, void *to);
__asm__(".text\n"
        ".globl emulated_switch\n"
        ".type emulated_switch, @function\n"
        "emulated_switch:\n"
        "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
        "    movq %rsp, (%rdi)\n"
        "    movq %rsi, %rsp\n"
        "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
        "    ret\n"
        ".size emulated_switch, .-emulated_switch\n");

static void change(struct fiber *from, struct fiber *to) {
    emulated_switch(&from->stack_pointer, to->stack_pointer);
}

static void prepare(struct fiber *f, unsigned char *stack, size_t bytes, void (*entry)(void)) {
    // As emulated_switch left it: six registers, then where to return to; there the stack is 8 off a multiple of 16.
    uint64_t *top = (uint64_t *)(void *)(stack + bytes) - 2;
    *top = (uint64_t)(uintptr_t)entry;
    memset(top - 6, 0, 6 * sizeof *top);
    f->stack_pointer = top - 6;
}
#else
static void change(struct fiber *from, struct fiber *to) {
    swapcontext(&from->context, &to->context);
}

static void prepare(struct fiber *f, unsigned char *stack, size_t bytes, void (*entry)(void)) {
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = stack;
    f->context.uc_stack.ss_size = bytes;
    f->context.uc_link = NULL;
    makecontext(&f->context, entry, 0);
}
#endif

static void set_state(struct block *b, struct fiber *f, enum thread_state state) {
    if (state == READY && f->state != SPINNING) n_moves++;
    b->n_in[f->state]--;
    f->state = state;
    if (state == READY) b->ready[b->n_in[READY]] = (uint16_t)f->number;
    b->n_in[state]++;
}

// ---- Barriers that copies arrive at -------------------------------------------------------------------------------

enum { BARRIER_MADE = 0xB7 };

// What the 64 bits of such a barrier hold.
struct arrivals {
    int32_t bytes;                  // still to come
    uint32_t threads : 11, of : 11; // still to arrive in this phase, and in each
    uint32_t phase : 1, made : 8;
};
_Static_assert(sizeof(struct arrivals) == sizeof(uint64_t), "in a barrier's place");

static struct arrivals barrier_read(const uint64_t *barrier) {
    struct arrivals a;
    memcpy(&a, barrier, sizeof a);
    if (a.made != BARRIER_MADE) emulated_fail("a barrier for copies was not made before its use");
    return a;
}

// Writes it back; a complete phase begins the next, and lets threads go on that waited for its end.
static void barrier_write(struct block *b, uint64_t *barrier, struct arrivals a) {
    bool complete = a.threads == 0 && a.bytes == 0;
    if (complete) a.phase ^= 1, a.threads = a.of;
    memcpy(barrier, &a, sizeof a);
    for (unsigned i = 0; complete && b->n_in[AT_COPY] && i < b->n_threads; i++) {
        struct fiber *f = &b->threads[i];
        if (f->state == AT_COPY && f->barrier == barrier && f->parity != a.phase) set_state(b, f, READY);
    }
}

static void carry_out(struct block *b, unsigned i) {
    struct copy c = b->copies[i];
    b->copies[i] = b->copies[--b->n_copies];
    memcpy(c.to, c.from ? c.from : c.data, c.bytes);
    n_moves++;
    struct arrivals a = barrier_read(c.barrier);
    a.bytes -= (int32_t)c.bytes;
    barrier_write(b, c.barrier, a);
}

// ---- Who goes on --------------------------------------------------------------------------------------------------

// Warp after warp, from any one on, up or down: who became ready last goes on first.
static void all_ready(struct block *b, enum thread_state from) {
    unsigned n = b->n_threads / WARP, at = 0, step = 1;
    if (!emulated_options.keep_order) at = below(n), step = emulated_chance(2) ? 1 : n - 1;
    for (unsigned w = 0; w < n; w++, at = (at + step) % n)
        for (unsigned i = at * WARP; i < (at + 1) * WARP; i++)
            if (b->threads[i].state == from) set_state(b, &b->threads[i], READY);
}

// When no thread is ready: lets some go on; false when the block has ended or is to be suspended.
static bool unblock(struct block *b) {
    if (b->is_early && b->n_in[AT_DEPENDENCY] && emulated_chance(2)) return false;
    bool met = b->n_in[AT_BARRIER] && b->n_in[AT_BARRIER] + b->n_in[ENDED] == b->n_threads;
    if (b->n_copies > 0 && !(met && (b->copies_last || emulated_chance(2)))) {
        emulated_counts.late_copies++;
        carry_out(b, below(b->n_copies));
        return true;
    }
    if (met) {
        all_ready(b, AT_BARRIER);
        return true;
    }
    if (b->n_in[AT_DEPENDENCY] || b->n_in[ENDED] == b->n_threads || b->cluster) return false;
    emulated_fail("the block hangs: %u threads at a barrier, %u at a warp's instruction, %u wait for a copy, %u ended",
                  b->n_in[AT_BARRIER], b->n_in[IN_WARP], b->n_in[AT_COPY], b->n_in[ENDED]);
}

static struct fiber *take_ready(struct block *b) {
    unsigned last = b->n_in[READY] - 1, among = last + 1 < b->choice ? last + 1 : b->choice, i = last - below(among);
    struct fiber *f = &b->threads[b->ready[i]];
    b->ready[i] = b->ready[last];
    set_state(b, f, RUNNING);
    emulated_place.thread = (dim3){f->number, 0, 0};
    return f;
}

// The current thread's state is set: another goes on, or what started or resumed the block.
static void leave(struct block *b) {
    struct fiber *self = b->current, *to = &b->outside;
    if (b->n_copies > 0 && !b->copies_last && emulated_chance(64)) carry_out(b, below(b->n_copies));
    while (b->n_in[READY] == 0 && unblock(b)) {
    }
    if (b->n_in[READY]) to = take_ready(b);
    b->current = to;
    if (to != self) change(self, to);
}

static void wait_as(enum thread_state state) {
    set_state(now, now->current, state);
    leave(now);
}

static void thread_main(void) {
    struct block *b = now;
    b->kernel->kernel.call(b->kernel->kernel.arguments);
    wait_as(ENDED);
    emulated_fail("a thread that had ended went on");
}

// ---- What kernels call --------------------------------------------------------------------------------------------

unsigned char *emulated_dynamic_shared(void) {
    return now->shared;
}

void emulated_pause(void) {
    if (emulated_chance(4)) wait_as(READY);
}

void emulated_syncthreads(void) {
    wait_as(AT_BARRIER);
}

void emulated_spin(void) {
    if (!now->cluster) emulated_fail("a thread waits for another block, which may not run at the same time");
    wait_as(SPINNING);
}

void emulated_sync_some(int id, unsigned n) {
    struct block *b = now;
    if (id < 1 || id >= MOST_SOME || n % WARP || n > b->n_threads) emulated_fail("barrier %d for %u threads", id, n);
    b->current->some = id;
    if (++b->n_at_some[id] < n) {
        wait_as(AT_SOME);
        return;
    }
    b->n_at_some[id] = 0;
    for (unsigned i = 0; i < b->n_threads; i++)
        if (b->threads[i].state == AT_SOME && b->threads[i].some == id) set_state(b, &b->threads[i], READY);
    emulated_pause();
}

void emulated_dependency_wait(void) {
    now->has_waited = true;
    if (now->is_early) wait_as(AT_DEPENDENCY);
}

static void multiply(struct share shares[WARP]);
static void group_issue(struct share shares[WARP]);
static void group_wait(int most);

// Where a thread's share of its warp's next instruction belongs.
static struct share *my_share(void) {
    unsigned number = now->current->number;
    struct warp *w = &now->warps[number / WARP];
    return &w->shares[w->met % 2][number % WARP];
}

// All lanes of a warp have brought their shares; the last to come does the work. Returns where the shares lie.
static struct share *meet(enum instruction instruction) {
    struct block *b = now;
    unsigned number = b->current->number, lane = number % WARP;
    struct warp *w = &b->warps[number / WARP];
    struct share *shares = w->shares[w->met % 2];
    if (w->arrived > 0 && w->instruction != instruction) emulated_fail("a warp's lanes are at different instructions");
    w->instruction = instruction;
    if (++w->arrived < WARP) {
        wait_as(IN_WARP);
        return shares;
    }
    if (instruction == MATRIX) multiply(shares);
    else if (instruction == GROUP_MATRIX) group_issue(shares);
    else if (instruction == GROUP_WAIT) group_wait((int)shares[0].a[0]);
    w->arrived = 0;
    w->met++;
    for (unsigned i = 0; i < WARP; i++)
        if (i != lane) set_state(b, &b->threads[number - lane + i], READY);
    return shares;
}

void emulated_syncwarp(void) {
    meet(SYNC_WARP);
}

uint64_t emulated_shuffle(uint64_t v, unsigned lane) {
    memcpy(my_share()->a, &v, sizeof v);
    memcpy(&v, meet(SHUFFLE)[lane % WARP].a, sizeof v);
    return v;
}

bool emulated_vote_all(bool v) {
    my_share()->a[0] = v;
    const struct share *shares = meet(VOTE);
    for (unsigned lane = 0; lane < WARP; lane++) v = v && shares[lane].a[0];
    return v;
}

static float low_half(uint32_t pair) {
    return (union {
               uint32_t u;
               float f;
           }){.u = pair << 16}
        .f;
}

static float high_half(uint32_t pair) {
    return (union {
               uint32_t u;
               float f;
           }){.u = pair & 0xFFFF0000u}
        .f;
}

#if defined(__x86_64__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

typedef float row_of_8 __attribute__((vector_size(8 * sizeof(float))));

// d += a b, a [16, 16], b [16, 8]: ascending k, each product and sum rounded to f32. Eight rows at a time, that no sum
// waits for the one before.
WIDE static void multiply_tiles(float (*restrict d)[8], float (*restrict a)[16], float (*restrict b)[8]) {
    enum { ROWS = 8 };
    for (unsigned first = 0; first < 16; first += ROWS) {
        row_of_8 sums[ROWS];
        memcpy(sums, d + first, sizeof sums);
        for (unsigned k = 0; k < 16; k++) {
            row_of_8 column;
            memcpy(&column, b[k], sizeof column);
#pragma GCC unroll 8
            for (unsigned row = 0; row < ROWS; row++) sums[row] += a[first + row][k] * column;
        }
        memcpy(d + first, sums, sizeof sums);
    }
}

static void multiply(struct share shares[WARP]) {
    float a[16][16], b[16][8], d[16][8];
    emulated_counts.matrix_steps++;
    for (unsigned lane = 0; lane < WARP; lane++) {
        const struct share *s = &shares[lane];
        unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < 4; i++) {
            unsigned row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
            a[row][column] = low_half(s->a[i]);
            a[row][column + 1] = high_half(s->a[i]);
            d[g + i / 2 * 8][2 * t + i % 2] = s->d[i];
        }
        for (unsigned i = 0; i < 2; i++) {
            b[2 * t + i * 8][g] = low_half(s->b[i]);
            b[2 * t + i * 8 + 1][g] = high_half(s->b[i]);
        }
    }
    multiply_tiles(d, a, b);
    for (unsigned lane = 0; lane < WARP; lane++)
        for (unsigned i = 0; i < 4; i++) shares[lane].d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

void emulated_mma(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    struct share *mine = my_share();
    memcpy(mine->a, a, sizeof mine->a);
    memcpy(mine->b, b, sizeof mine->b);
    memcpy(mine->d, d, sizeof mine->d);
    meet(MATRIX);
    memcpy(d, mine->d, sizeof mine->d);
}

static struct group_warp *my_group(void) {
    return &now->groups[now->current->number / WARP];
}

// Where b lies in shared memory: matrices of 8 columns by 8 k; or rows of 64 bytes whose 16-byte words are turned by
// the row's address: 32 k of a column, or, `across`, 32 columns of a k.
struct group_matrices {
    size_t at, k_step, column_step;
    bool rows_of_64, across;
};

static struct group_matrices group_matrices(uint64_t operand, bool across) {
    struct group_matrices m = {(size_t)(operand & 0x3FFF) << 4, (size_t)(operand >> 16 & 0x3FFF) << 4,
                               (size_t)(operand >> 32 & 0x3FFF) << 4, operand >> 62 == 2, across};
    if ((operand & ~((uint64_t)2 << 62)) >> 46 || (across && !m.rows_of_64))
        emulated_fail("a group's operand in another order than the emulator knows: %llx", (unsigned long long)operand);
    return m;
}

static float group_element(const struct group_matrices *m, size_t column, size_t k) {
    size_t at = m->at;
    uint16_t v;
    if (!m->rows_of_64) at += column / 8 * m->column_step + k / 8 * m->k_step + column % 8 * 16 + k % 8 * 2;
    else if (m->across) at += column / 32 * m->k_step + k / 8 * m->column_step + k % 8 * 64 + column % 32 * 2;
    else at += column / 8 * m->column_step + column % 8 * 64 + k * 2;
    if (m->rows_of_64) at ^= (at >> 7 & 3) << 4;
    if (at + sizeof v > now->kernel->shared) emulated_fail("a group's operand reaches beyond shared memory");
    memcpy(&v, now->shared + at, sizeof v);
    return low_half(v);
}

// One step of a chain: what shared memory holds now.
static void group_step(struct group_chain *c, int step) {
    struct group_matrices b = group_matrices(c->steps[step].b, c->steps[step].across);
    float x[16][16], y[16][8], d[16][8];
    emulated_counts.matrix_steps += (size_t)c->n / 8;
    for (unsigned lane = 0; lane < WARP; lane++)
        for (unsigned i = 0; i < 4; i++) {
            unsigned row = lane / 4 + i % 2 * 8, column = lane % 4 * 2 + i / 2 * 8;
            x[row][column] = low_half(c->steps[step].a[lane][i]);
            x[row][column + 1] = high_half(c->steps[step].a[lane][i]);
        }
    for (int j = 0; j < c->n / 8; j++) {
        for (size_t k = 0; k < 16; k++)
            for (size_t column = 0; column < 8; column++) y[k][column] = group_element(&b, (size_t)j * 8 + column, k);
        for (unsigned row = 0; row < 16; row++) memcpy(d[row], &c->sums[row][j * 8], sizeof d[row]);
        multiply_tiles(d, x, y);
        for (unsigned row = 0; row < 16; row++) memcpy(&c->sums[row][j * 8], d[row], sizeof d[row]);
    }
}

// A warp's lanes have brought their shares: a in a, b in b, n in the first lane's d[0], and whether to add in d[1].
static void group_issue(struct share shares[WARP]) {
    struct group_warp *g = my_group();
    struct group_chain *c = NULL;
    int n = (int)shares[0].d[0];
    bool add = shares[0].d[1] != 0;
    if (!g->is_fenced) emulated_fail("a group's matrix instruction without a fence before it");
    for (unsigned lane = 1; lane < WARP; lane++)
        if (memcmp(shares[lane].b, shares[0].b, sizeof shares[0].b) != 0)
            emulated_fail("a warp's lanes name different operands");
    for (int i = 0; i < g->n_chains; i++)
        if (g->chains[i].to[0] == shares[0].to) c = &g->chains[i];
    if (c && c->is_committed && !add) emulated_fail("a group's sums are used again before they were waited for");
    if (c) c->is_committed = false; // a chain of several batches, which here ends with its last one
    if (!c) {
        if (g->n_chains == MOST_CHAINS) emulated_fail("more than %d chains of a group under way", MOST_CHAINS);
        c = &g->chains[g->n_chains++];
        c->n = n;
        c->n_steps = 0;
        c->is_committed = false;
        c->at_once = emulated_options.keep_order || emulated_chance(2);
        for (unsigned lane = 0; lane < WARP; lane++) {
            c->to[lane] = shares[lane].to;
            for (int i = 0; i < n / 2; i++) {
                int row = (int)lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + (int)lane % 4 * 2 + i % 2;
                c->sums[row][column] = add ? shares[lane].to[i] : 0.0f;
                shares[lane].to[i] = NAN; // nobody's before the wait
            }
        }
    } else if (!add) emulated_fail("a chain of a group begins anew before it was waited for");
    if (c->n_steps == MOST_STEPS || c->n != n)
        emulated_fail("a group's chain of %d steps and %d columns", c->n_steps, n);
    for (unsigned lane = 0; lane < WARP; lane++)
        memcpy(c->steps[c->n_steps].a[lane], shares[lane].a, sizeof shares[lane].a);
    memcpy(&c->steps[c->n_steps].b, shares[0].b, sizeof c->steps[0].b);
    c->steps[c->n_steps].across = shares[0].across;
    if (c->at_once) group_step(c, c->n_steps);
    c->n_steps++;
    g->n_issued++;
}

// Chains were committed one by one: all but the last `most` of them are done.
static void group_wait(int most) {
    struct group_warp *g = my_group();
    int committed = 0, done = 0;
    for (int i = 0; i < g->n_chains; i++) committed += g->chains[i].is_committed;
    for (; committed - done > most; done++) {
        struct group_chain *c = &g->chains[done];
        for (int i = 0; !c->at_once && i < c->n_steps; i++) group_step(c, i);
        for (int lane = 0; lane < WARP; lane++)
            for (int i = 0; i < c->n / 2; i++)
                c->to[lane][i] = c->sums[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
    }
    memmove(g->chains, g->chains + done, (size_t)(g->n_chains - done) * sizeof *g->chains);
    g->n_chains -= done;
    g->is_fenced = false;
}

void emulated_group_fence(void) {
    my_group()->is_fenced = true;
    meet(GROUP_FENCE);
}

void emulated_load_staged(const void *at) {
    struct loads *l = &now->loads[now->current->number];
    if (l->n == MOST_LOADS) emulated_fail("more than %d loads that nothing has used", MOST_LOADS);
    l->list[l->n].at = at;
    memcpy(l->list[l->n++].value, at, LOAD);
}

// A load may take until its value is used: by then it must not be another.
static void end_loads(void) {
    struct loads *l = &now->loads[now->current->number];
    for (unsigned i = 0; i < l->n; i++)
        if (memcmp(l->list[i].at, l->list[i].value, LOAD) != 0)
            emulated_fail("a stage was overwritten before what was loaded from it was used");
    l->n = 0;
}

void emulated_group_mma(float *d, int n, const uint32_t a[4], uint64_t b, bool across, bool add) {
    end_loads();
    struct share *mine = my_share();
    memcpy(mine->a, a, sizeof mine->a);
    memcpy(mine->b, &b, sizeof mine->b);
    mine->d[0] = (float)n;
    mine->d[1] = add;
    mine->to = d;
    mine->across = across;
    meet(GROUP_MATRIX);
}

void emulated_group_commit(void) {
    struct group_warp *g = my_group();
    for (int i = 0; i < g->n_chains; i++) g->chains[i].is_committed = true;
    meet(GROUP_COMMIT);
}

void emulated_group_wait(int most) {
    my_share()->a[0] = (uint32_t)most;
    meet(GROUP_WAIT);
}

void emulated_group_registers(int n) {
    if (n < 24 || n > 256 || n % 8) emulated_fail("%d registers for a warp's threads", n);
    meet(REGISTERS);
}

uint32_t emulated_shared_address(const void *p) {
    return (uint32_t)((const unsigned char *)p - now->shared);
}

static void check_shared(const void *p, size_t bytes, const char *what) {
    const unsigned char *at = p;
    struct module_memory m = statics();
    bool is_dynamic = at >= now->shared && at + bytes <= now->shared + now->kernel->shared;
    if (!is_dynamic && !(at >= m.at && at + bytes <= m.at + m.bytes))
        emulated_fail("%s is not in the block's shared memory", what);
}

void emulated_barrier_init(uint64_t *barrier, unsigned n_threads) {
    check_shared(barrier, sizeof *barrier, "a barrier");
    if (n_threads == 0 || n_threads > MOST_THREADS) emulated_fail("a barrier for %u threads", n_threads);
    struct arrivals a = {.threads = n_threads & 2047, .of = n_threads & 2047, .made = BARRIER_MADE};
    memcpy(barrier, &a, sizeof a);
}

void emulated_barrier_expect(uint64_t *barrier, uint32_t bytes) {
    struct arrivals a = barrier_read(barrier);
    if (a.threads == 0) emulated_fail("more threads arrived at a barrier than it is for (%u)", a.of);
    a.bytes += (int32_t)bytes;
    a.threads--;
    barrier_write(now, barrier, a);
}

// Bytes that a thread asks for before it arrives.
void emulated_barrier_await(uint64_t *barrier, uint32_t bytes) {
    struct arrivals a = barrier_read(barrier);
    a.bytes += (int32_t)bytes;
    barrier_write(now, barrier, a);
}

void emulated_barrier_arrive(uint64_t *barrier) {
    emulated_barrier_expect(barrier, 0);
}

void emulated_barrier_wait(uint64_t *barrier, uint32_t parity) {
    if (barrier_read(barrier).phase != parity) return;
    now->current->barrier = barrier;
    now->current->parity = parity;
    wait_as(AT_COPY);
}

void emulated_bulk_copy(void *to, const void *from, uint32_t bytes, uint64_t *barrier) {
    struct block *b = now;
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16 || bytes == 0)
        emulated_fail("a bulk copy of %u bytes from %p to %p: 16 bytes and multiples of them are expected", bytes, from,
                      to);
    check_shared(to, bytes, "a bulk copy's target");
    emulated_check_range(from, bytes, "a bulk copy's source");
    if (b->n_copies == MOST_COPIES) emulated_fail("more than %d bulk copies under way", MOST_COPIES);
    b->copies[b->n_copies++] = (struct copy){.to = to, .from = from, .bytes = bytes, .barrier = barrier};
    emulated_counts.copies++;
    if (emulated_options.keep_order || (!b->copies_last && emulated_chance(2))) carry_out(b, b->n_copies - 1);
}

// ---- Clusters -----------------------------------------------------------------------------------------------------

unsigned emulated_cluster_rank(void) {
    return now->rank;
}

void emulated_cluster_sync(void) {
    struct block *b = now;
    unsigned waiting = 1, all = 0;
    for (unsigned i = 0; i < b->n_cluster; i++) {
        waiting += b->cluster[i]->n_in[AT_CLUSTER];
        all += b->cluster[i]->n_threads;
    }
    if (waiting < all) {
        wait_as(AT_CLUSTER);
        return;
    }
    for (unsigned i = 0; i < b->n_cluster; i++) all_ready(b->cluster[i], AT_CLUSTER);
    emulated_pause();
}

// What a thread writes to another block's shared memory arrives there as copies do.
void emulated_push(void *at, const void *data, unsigned bytes, uint64_t *barrier, unsigned rank) {
    if (!now->cluster || rank >= now->n_cluster) emulated_fail("a push to block %u of the cluster", rank);
    if ((uintptr_t)at % bytes) emulated_fail("a push of %u bytes to %p", bytes, at);
    check_shared(at, bytes, "a push's target");
    check_shared(barrier, sizeof *barrier, "a push's barrier");
    struct block *to = now->cluster[rank];
    if (to->n_in[ENDED] == to->n_threads) emulated_fail("a push to a block that has ended");
    if (to->n_copies == MOST_COPIES) emulated_fail("more than %d copies under way", MOST_COPIES);
    struct copy c = {.bytes = bytes};
    c.to = to->shared + ((unsigned char *)at - now->shared);
    c.barrier = (uint64_t *)(void *)(to->shared + ((unsigned char *)barrier - now->shared));
    memcpy(c.data, data, bytes);
    to->copies[to->n_copies++] = c;
    if (emulated_options.keep_order || (!to->copies_last && emulated_chance(2))) carry_out(to, to->n_copies - 1);
}

// ---- Blocks -------------------------------------------------------------------------------------------------------

enum { SHARED_MAPPED = (MOST_SHARED + GUARD - 1) / GUARD * GUARD + GUARD };

static void *map(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

struct block *block_create(void) {
    struct block *b = calloc(1, sizeof *b);
    if (!b) return NULL;
    size_t n_statics = statics().bytes;
    b->stacks = map((size_t)MOST_THREADS * STACK);
    b->base = map(SHARED_MAPPED);
    b->statics = malloc(n_statics ? n_statics : 1);
    bool ok = b->stacks && b->base && b->statics;
    for (size_t i = 0; ok && i < MOST_THREADS; i++) ok = mprotect(b->stacks + i * STACK, GUARD, PROT_NONE) == 0;
    if (ok && mprotect(b->base + SHARED_MAPPED - GUARD, GUARD, PROT_NONE) == 0) return b;
    block_free(b);
    return NULL;
}

void block_free(struct block *b) {
    if (!b) return;
    if (b->stacks) munmap(b->stacks, (size_t)MOST_THREADS * STACK);
    if (b->base) munmap(b->base, SHARED_MAPPED);
    free(b->statics);
    free(b);
}

// Lets the block's ready threads run until none is.
static bool run(struct block *b) {
    now = b;
    emulated_place.block = b->index;
    emulated_place.grid_size = b->kernel->grid;
    emulated_place.block_size = (dim3){b->kernel->threads, 1, 1};
    b->current = take_ready(b);
    change(&b->outside, b->current);
    now = NULL;
    if (b->n_in[ENDED] < b->n_threads) return false;
    return true;
}

static void must_have_ended(struct block *b) {
    now = b; // for the message
    if (b->n_copies) emulated_fail("the block ended with %u copies under way", b->n_copies);
    for (unsigned i = 0; i < b->n_threads / WARP; i++) {
        if (b->groups[i].n_chains) emulated_fail("warp %u ended with matrix instructions under way", i);
        if (b->groups[i].n_issued != b->groups[i / 4 * 4].n_issued)
            emulated_fail("the warps of a group issued %u and %u matrix instructions", b->groups[i].n_issued,
                          b->groups[i / 4 * 4].n_issued);
    }
    if (!b->has_waited) emulated_fail("the block ended without a wait for the kernel before");
    now = NULL;
}

static void prepare_block(struct block *b, const struct kernel_node *k, size_t index, bool early) {
    size_t plane = (size_t)k->grid.x * k->grid.y;
    b->kernel = k;
    b->index =
        (dim3){(unsigned)(index % k->grid.x), (unsigned)(index / k->grid.x % k->grid.y), (unsigned)(index / plane)};
    b->n_threads = k->threads;
    b->is_early = early;
    b->has_waited = false;
    // Mostly one warp goes on and on, as caches like it; now and then they take turns.
    b->choice = emulated_options.keep_order ? 1 : emulated_chance(8) ? MOST_THREADS : WARP;
    b->copies_last = emulated_chance(2);
    b->n_copies = 0;
    b->cluster = NULL;
    memset(b->n_in, 0, sizeof b->n_in);
    memset(b->n_at_some, 0, sizeof b->n_at_some);
    for (unsigned i = 0; i < (b->n_threads + WARP - 1) / WARP; i++) {
        b->warps[i].arrived = b->warps[i].met = 0;
        b->groups[i].n_chains = 0;
        b->groups[i].n_issued = 0;
        b->groups[i].is_fenced = false;
    }
    size_t dynamic = (k->shared + 127) / 128 * 128;
    b->shared = b->base + SHARED_MAPPED - GUARD - dynamic;
    memset(b->shared, 0xFF, dynamic);
    struct module_memory m = statics();
    memset(m.at, 0xFF, m.bytes);
    for (unsigned i = 0; i < b->n_threads; i++) {
        struct fiber *f = &b->threads[i];
        f->number = i;
        f->state = RUNNING;
        b->loads[i].n = 0;
        b->n_in[RUNNING]++;
        // Not all stacks at the same place of a page, for the cache's sake.
        prepare(f, b->stacks + (size_t)i * STACK + GUARD, STACK - GUARD - i % 32 * 192, thread_main);
    }
    all_ready(b, RUNNING);
    emulated_counts.blocks++;
    if (early) emulated_counts.early_blocks++;
}

bool block_start(struct block *b, const struct kernel_node *k, size_t index, bool early) {
    prepare_block(b, k, index, early);
    struct module_memory m = statics();
    if (run(b)) {
        must_have_ended(b);
        return true;
    }
    memcpy(b->statics, m.at, m.bytes);
    return false;
}

void block_resume(struct block *b) {
    struct module_memory m = statics();
    memcpy(m.at, b->statics, m.bytes);
    b->is_early = false;
    all_ready(b, AT_DEPENDENCY);
    run(b);
    must_have_ended(b);
}

// Blocks take turns, each until none of its threads can go on. The kernel has no static shared memory.
void blocks_run_together(struct block **blocks, size_t first_index, size_t n, const struct kernel_node *k) {
    enum { ROUNDS = 64 };
    size_t n_ended = 0, still = 0;
    for (size_t i = 0; i < n; i++) {
        struct block *b = blocks[i];
        prepare_block(b, k, first_index + i, false);
        b->rank = (unsigned)(i % k->cluster);
        b->n_cluster = k->cluster;
        b->cluster = blocks + i - b->rank;
    }
    while (n_ended < n) {
        size_t first = emulated_options.keep_order ? 0 : (size_t)below((unsigned)n), before = n_moves;
        for (size_t i = 0; i < n; i++) {
            struct block *b = blocks[(first + i) % n];
            if (b->n_in[ENDED] == b->n_threads) continue;
            all_ready(b, SPINNING);
            now = b;
            while (b->n_in[READY] == 0 && unblock(b)) {
            }
            now = NULL;
            if (b->n_in[READY] && run(b)) n_ended++;
        }
        still = n_moves == before ? still + 1 : 0;
        if (still == ROUNDS) {
            now = blocks[first];
            emulated_fail("the blocks wait for each other for ever");
        }
    }
    for (size_t i = 0; i < n; i++) must_have_ended(blocks[i]);
}

void emulated_fail(const char *format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    fprintf(stderr, "emulated GPU: %s", text);
    if (now) {
        fprintf(stderr, " (kernel %p, block %u, %u, %u of %u, %u, %u", now->kernel->kernel.kernel, now->index.x,
                now->index.y, now->index.z, now->kernel->grid.x, now->kernel->grid.y, now->kernel->grid.z);
        if (now->current != &now->outside) fprintf(stderr, ", thread %u", now->current->number);
        fprintf(stderr, ")");
    }
    fprintf(stderr, "\n");
    _exit(1);
}
