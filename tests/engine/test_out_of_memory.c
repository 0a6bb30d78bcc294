// test_out_of_memory.c: every allocation of opening a model, tokenising, templating and generating a token fails once,
// and from it on: each run ends with success or with an error that says "out of memory", and nothing leaks.
//
// The linker puts __wrap_malloc and its like in front of the library's calls (Makefile); jansson is given the same.
// What the C library and other libraries allocate inside is not reached.
#include "tandem.h"
#include "text/template.h"

#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static atomic_long made, live, fail_at; // fail_at 0: none fails
static bool fail_on;                    // all from fail_at on

static bool fails(void) {
    long n = atomic_fetch_add(&made, 1) + 1, at = atomic_load(&fail_at);
    return at > 0 && (n == at || (fail_on && n > at));
}

void *__real_malloc(size_t n);
void *__real_calloc(size_t count, size_t n);
void *__real_realloc(void *old, size_t n);
void *__real_aligned_alloc(size_t alignment, size_t n);
char *__real_strdup(const char *text);
char *__real_strndup(const char *text, size_t n);
void __real_free(void *p);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t count, size_t n);
void *__wrap_realloc(void *old, size_t n);
void *__wrap_aligned_alloc(size_t alignment, size_t n);
char *__wrap_strdup(const char *text);
char *__wrap_strndup(const char *text, size_t n);
void __wrap_free(void *p);

static void *counted(void *p) {
    if (p) atomic_fetch_add(&live, 1);
    return p;
}

void *__wrap_malloc(size_t n) {
    return fails() ? NULL : counted(__real_malloc(n));
}

void *__wrap_calloc(size_t count, size_t n) {
    return fails() ? NULL : counted(__real_calloc(count, n));
}

void *__wrap_realloc(void *old, size_t n) {
    if (fails()) return NULL;
    void *p = __real_realloc(old, n);
    if (p && !old) atomic_fetch_add(&live, 1);
    return p;
}

void *__wrap_aligned_alloc(size_t alignment, size_t n) {
    return fails() ? NULL : counted(__real_aligned_alloc(alignment, n));
}

char *__wrap_strdup(const char *text) {
    return fails() ? NULL : counted(__real_strdup(text));
}

char *__wrap_strndup(const char *text, size_t n) {
    return fails() ? NULL : counted(__real_strndup(text, n));
}

void __wrap_free(void *p) {
    if (p) atomic_fetch_sub(&live, 1);
    __real_free(p);
}

// One piece of work that frees what it makes. False: it failed, with the words in `err`.
typedef bool work_fn(char *err, size_t err_size);

static bool open_tokenizer(char *err, size_t err_size) {
    struct error e = {""};
    struct tokenizer *tok = tokenizer_open_folder("models/tandem-tiny", &e);
    snprintf(err, err_size, "%s", e.text);
    bool ok = tok != NULL;
    tokenizer_free(tok);
    return ok;
}

static tandem_engine *engine; // for the pieces that need one

static tandem_engine *open_engine(char *err, size_t err_size) {
    tandem_options options = {.model = "models/tandem-tiny", .context = 64, .threads = 2};
    return tandem_open(&options, err, err_size);
}

static bool open_model(char *err, size_t err_size) {
    tandem_engine *e = open_engine(err, err_size);
    tandem_close(e);
    return e != NULL;
}

static bool tokenize(char *err, size_t err_size) {
    static const char text[] =
        "Hello, e\xcc\x81 <|im_start|>world <think> 123\n\n  int main(void) aaaaaaaaaaaaaaaaaaaaaaaa"
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    int32_t *ids = NULL;
    char *back = NULL;
    size_t n, n_back;
    bool ok = tandem_tokenize(engine, text, sizeof text - 1, true, &ids, &n, err, err_size) == TANDEM_OK &&
              tandem_detokenize(engine, ids, n, &back, &n_back, err, err_size) == TANDEM_OK;
    tandem_free(ids);
    tandem_free(back);
    return ok;
}

static bool apply_template(char *err, size_t err_size) {
    static const char json[] =
        "{\"messages\":[{\"role\":\"system\",\"content\":\"s\"},{\"role\":\"user\",\"content\":\"x\\n\"},{\"role\":"
        "\"assistant\",\"content\":\"\",\"reasoning_content\":\"r\",\"tool_calls\":[{\"name\":\"f\",\"arguments\":{"
        "\"a\":[1,2.5,null,\"\\u00e9\"]}}]},{\"role\":\"tool\",\"content\":\"t\"}],\"tools\":[{\"type\":\"function\","
        "\"function\":{\"name\":\"f\",\"parameters\":{\"b\":1e5}}}]}";
    int32_t *ids = NULL;
    size_t n;
    bool ok = tandem_apply_template(engine, json, sizeof json - 1, -1, &ids, &n, err, err_size) == TANDEM_OK;
    tandem_free(ids);
    return ok;
}

static bool generate(char *err, size_t err_size) {
    static const int32_t prompt[] = {1, 2, 3, 4, 5, 6, 7, 8};
    tandem_token token;
    tandem_session *s = tandem_session_new(engine, NULL, err, err_size);
    bool ok = s && tandem_session_append(s, prompt, 8, err, err_size) == TANDEM_OK &&
              tandem_session_next(s, &token, err, err_size) >= 0;
    tandem_session_free(s);
    return ok;
}

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { SLOWER = 12 };
#else
enum { SLOWER = 1 };
#endif

// Runs `work` with its n-th allocation failing, for every n (every `step`-th beyond the first 60), once and for good.
static void fail_each(const char *name, work_fn *work, long step) {
    char err[1024] = "";
    long before = atomic_load(&live), from = atomic_load(&made);
    if (!work(err, sizeof err)) fail_msg("%s: %s", name, err); // whatever is made once only, is made now
    from = atomic_load(&made);
    before = atomic_load(&live);
    if (!work(err, sizeof err)) fail_msg("%s: %s", name, err);
    long total = atomic_load(&made) - from, failures = 0;
    assert_int_equal(atomic_load(&live), before);
    assert_true(total > 0);
    for (int mode = 0; mode < 2; mode++) {
        for (long n = 1; n <= total; n += n < 60 / SLOWER ? 1 : step * SLOWER) {
            err[0] = '\0';
            fail_on = mode == 1;
            atomic_store(&made, 0);
            atomic_store(&fail_at, n);
            bool ok = work(err, sizeof err);
            atomic_store(&fail_at, 0);
            failures += !ok;
            if (!ok && !strstr(err, "out of memory"))
                fail_msg("%s: allocation %ld of %ld failed and the message is: \"%s\"", name, n, total, err);
            if (atomic_load(&live) != before)
                fail_msg("%s: allocation %ld of %ld failed: %ld blocks leaked", name, n, total,
                         atomic_load(&live) - before);
        }
    }
    assert_true(failures > 0);
    if (!work(err, sizeof err)) fail_msg("%s, afterwards: %s", name, err); // nothing was left broken
    print_message("%s: %ld allocations, %ld failures\n", name, total, failures);
}

static void test_opening(void **state) {
    (void)state;
    fail_each("opening the tokenizer", open_tokenizer, getenv("TANDEM_THOROUGH") ? 1 : 3);
    fail_each("opening the model", open_model, getenv("TANDEM_THOROUGH") ? 1 : 7); // most of it is the tokenizer
}

static void test_working(void **state) {
    (void)state;
    char err[1024];
    engine = open_engine(err, sizeof err);
    if (!engine) fail_msg("%s", err);
    fail_each("tokenising", tokenize, 1);
    fail_each("templating", apply_template, 1);
    fail_each("generating", generate, 1);
    tandem_close(engine);
}

int main(void) {
    json_set_alloc_funcs(__wrap_malloc, __wrap_free);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_opening),
        cmocka_unit_test(test_working),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
