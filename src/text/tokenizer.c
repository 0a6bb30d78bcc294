// tokenizer.c: encoding and decoding with a tokenizer that tokenizer_json.c filled. Added tokens are cut out first,
// then the text between them is normalised, cut into words and merged.
#include "text/tokenizer.h"

#include "base/size.h"
#include "text/tokenizer_parts.h"
#include "text/unicode.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool token_ids_append(struct token_ids *list, const int32_t *ids, size_t n) {
    size_t wanted;
    if (!size_add(list->n, n, &wanted)) return false;
    if (wanted > list->cap) {
        size_t cap = list->cap > SIZE_MAX / 2 || list->cap * 2 < wanted ? wanted : list->cap * 2;
        int32_t *grown = size_realloc(list->ids, cap, sizeof *grown);
        if (!grown) return false;
        list->ids = grown;
        list->cap = cap;
    }
    if (n > 0) memcpy(list->ids + list->n, ids, n * sizeof *ids);
    list->n = wanted;
    return true;
}

void token_ids_free(struct token_ids *list) {
    free(list->ids);
    *list = (struct token_ids){0};
}

// The byte-level alphabet (GPT-2): printable Latin-1 stands for itself, the other 68 bytes for U+0100 and up in order.
static uint32_t byte_character(unsigned b) {
    if ((b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE) return b;
    if (b <= 0x20) return 0x100 + b;
    if (b <= 0xA0) return 0x100 + 33 + (b - 0x7F);
    return 0x100 + 67; // 0xAD
}

// The inverse; -1: not of the alphabet.
static int character_byte(uint32_t c) {
    if (c < 0x100) return byte_character(c) == c ? (int)c : -1;
    if (c <= 0x120) return (int)(c - 0x100);
    if (c <= 0x142) return (int)(c - 0x121 + 0x7F);
    return c == 0x143 ? 0xAD : -1;
}

struct tokenizer *tokenizer_new(int32_t n_ids, struct error *err) {
    struct tokenizer *tok = size_alloc_zero(1, sizeof *tok);
    if (!tok) goto no_memory;
    tok->bos = tok->eos = -1;
    tok->n_ids = n_ids;
    tok->tokens = size_alloc_zero((size_t)n_ids, sizeof *tok->tokens);
    size_t slots = 16;
    while (slots < (size_t)n_ids * 2) slots *= 2;
    tok->mask = slots - 1;
    tok->slots = size_alloc(slots, sizeof *tok->slots);
    if (!tok->tokens || !tok->slots) goto no_memory;
    for (size_t i = 0; i < slots; i++) tok->slots[i] = -1;
    return tok;
no_memory:
    error_set(err, "tokenizer: out of memory for %d tokens", n_ids);
    tokenizer_free(tok);
    return NULL;
}

void tokenizer_free(struct tokenizer *tok) {
    if (!tok) return;
    free(tok->normalized.tokens);
    free(tok->raw.tokens);
    bpe_free(&tok->bpe);
    free(tok->slots);
    free(tok->tokens);
    arena_free(&tok->arena);
    free(tok);
}

static size_t hash_content(const char *p, size_t n) {
    uint64_t h = 0xCBF29CE484222325u ^ n;
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)p[i]) * 0x100000001B3u;
    return (size_t)(h ^ h >> 32);
}

static size_t find_slot(const struct tokenizer *tok, const char *content, size_t n) {
    size_t i = hash_content(content, n) & tok->mask;
    for (; tok->slots[i] >= 0; i = (i + 1) & tok->mask) {
        const struct token *t = &tok->tokens[tok->slots[i]];
        if (t->n_content == n && memcmp(t->content, content, n) == 0) break;
    }
    return i;
}

int32_t tokenizer_find_content(const struct tokenizer *tok, const char *content, size_t n) {
    return tok->slots[find_slot(tok, content, n)];
}

bool tokenizer_put(struct tokenizer *tok, int32_t id, const char *content, size_t n, struct error *err) {
    if (id < 0 || id >= tok->n_ids) return error_set(err, "tokenizer: id %d is outside [0, %d)", id, tok->n_ids);
    struct token *t = &tok->tokens[id];
    int shown = n < 60 ? (int)n : 60;
    if (t->content)
        return error_set(err, "tokenizer: id %d belongs to two tokens, '%.60s' and '%.*s'", id, t->content, shown,
                         content);
    size_t slot = find_slot(tok, content, n);
    if (tok->slots[slot] >= 0)
        return error_set(err, "tokenizer: token '%.*s' has two ids, %d and %d", shown, content, tok->slots[slot], id);
    char *copy = arena_copy_text(&tok->arena, content, n);
    char *bytes = copy ? arena_alloc(&tok->arena, n + 1, 1) : NULL;
    if (!bytes) return error_set(err, "tokenizer: out of memory");
    size_t n_bytes = 0;
    for (size_t i = 0; i < n;) {
        uint32_t c;
        i += utf8_decode(content + i, n - i, &c);
        int b = character_byte(c);
        if (b < 0) { // not byte-level: it stands for its own text
            memcpy(bytes, content, n);
            n_bytes = n;
            break;
        }
        bytes[n_bytes++] = (char)(unsigned char)b;
    }
    bytes[n_bytes] = '\0';
    *t = (struct token){.content = copy, .bytes = bytes, .n_content = n, .n_bytes = n_bytes};
    tok->slots[slot] = id;
    return true;
}

bool tokenizer_merge(struct tokenizer *tok, const char *left, size_t n_left, const char *right, size_t n_right,
                     uint32_t rank, struct error *err) {
    size_t n;
    int shown_left = n_left < 60 ? (int)n_left : 60, shown_right = n_right < 60 ? (int)n_right : 60;
    struct bpe_merge m = {.rank = rank};
    m.left = tokenizer_find_content(tok, left, n_left);
    m.right = tokenizer_find_content(tok, right, n_right);
    if (n_left == 0 || n_right == 0 || m.left < 0 || m.right < 0 || !size_add(n_left, n_right, &n))
        return error_set(err, "tokenizer: merge %u joins '%.*s' and '%.*s', which are not both tokens", rank,
                         shown_left, left, shown_right, right);
    char *joined = size_alloc(n, 1);
    if (!joined) return error_set(err, "tokenizer: out of memory");
    memcpy(joined, left, n_left);
    memcpy(joined + n_left, right, n_right);
    m.merged = tokenizer_find_content(tok, joined, n);
    free(joined);
    if (m.merged < 0)
        return error_set(err, "tokenizer: merge %u joins '%.*s' and '%.*s' to what is no token", rank, shown_left, left,
                         shown_right, right);
    if (!bpe_add(&tok->bpe, &m))
        return error_set(err, "tokenizer: merge %u, '%.*s' and '%.*s', is a duplicate", rank, shown_left, left,
                         shown_right, right);
    return true;
}

bool added_set_add(struct tokenizer *tok, struct added_set *set, struct added_token token) {
    struct buffer text = {0};
    if (set == &tok->normalized && tok->nfc) {
        if (!unicode_nfc(token.text, token.n, &text)) goto no_memory;
        token.text = buffer_text(&text);
        token.n = text.len;
    }
    token.text = arena_copy_text(&tok->arena, token.text, token.n);
    struct added_token *grown = token.text ? size_realloc(set->tokens, set->n + 1, sizeof *grown) : NULL;
    if (!grown) goto no_memory;
    set->tokens = grown;
    set->tokens[set->n++] = token;
    buffer_free(&text);
    return true;
no_memory:
    buffer_free(&text);
    return false;
}

static int compare_added(const void *a, const void *b) {
    const struct added_token *x = a, *y = b;
    unsigned char cx = (unsigned char)x->text[0], cy = (unsigned char)y->text[0];
    if (cx != cy) return cx < cy ? -1 : 1;
    if (x->n != y->n) return x->n > y->n ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

static void added_set_finish(struct added_set *set) {
    if (set->n > 1) qsort(set->tokens, set->n, sizeof *set->tokens, compare_added);
    size_t i = 0;
    for (size_t b = 0; b < 257; b++) {
        while (i < set->n && (unsigned char)set->tokens[i].text[0] < b) i++;
        set->start[b] = i;
    }
}

bool tokenizer_finish(struct tokenizer *tok, struct error *err) {
    for (unsigned b = 0; b < 256; b++) {
        struct buffer c = {0};
        if (!utf8_append(&c, byte_character(b))) return error_set(err, "tokenizer: out of memory");
        tok->byte_id[b] = tokenizer_find_content(tok, c.data, c.len);
        buffer_free(&c);
        if (tok->byte_id[b] < 0) return error_set(err, "tokenizer: the vocabulary has no token for byte 0x%02X", b);
    }
    added_set_finish(&tok->raw);
    added_set_finish(&tok->normalized);
    static const char *const names[] = {"qwen2", "llama3", "gpt-2", "digits", "digit runs"};
    int n = snprintf(tok->describe, sizeof tok->describe, "byte-level BPE, ");
    for (int i = 0; i < tok->pre.n_steps && n < (int)sizeof tok->describe; i++)
        n += snprintf(tok->describe + n, sizeof tok->describe - (size_t)n, "%s%s", i ? " + " : "",
                      names[tok->pre.steps[i]]);
    if (n < (int)sizeof tok->describe)
        snprintf(tok->describe + n, sizeof tok->describe - (size_t)n, " pre-tokeniser, %s",
                 tok->nfc ? "NFC" : "no normalisation");
    return true;
}

// One call of tokenizer_encode.
struct encoder {
    const struct tokenizer *tok;
    bool special;
    struct token_ids *out;
    struct bpe_scratch scratch;
    struct buffer normal, spelt;
};

static bool encode_word(void *user, const char *text, size_t n) {
    struct encoder *e = user;
    const struct tokenizer *tok = e->tok;
    if (tok->ignore_merges) {
        buffer_clear(&e->spelt);
        for (size_t i = 0; i < n; i++)
            if (!utf8_append(&e->spelt, byte_character((unsigned char)text[i]))) return false;
        int32_t id = tokenizer_find_content(tok, e->spelt.data, e->spelt.len);
        if (id >= 0 && !tok->tokens[id].added) return token_ids_append(e->out, &id, 1);
    }
    int32_t chunk[256];
    size_t start = e->out->n;
    for (size_t i = 0; i < n;) {
        size_t k = 0;
        while (k < 256 && i < n) chunk[k++] = tok->byte_id[(unsigned char)text[i++]];
        if (!token_ids_append(e->out, chunk, k)) return false;
    }
    size_t kept = bpe_apply(&tok->bpe, e->out->ids + start, n, &e->scratch);
    if (kept == SIZE_MAX) return false;
    e->out->n = start + kept;
    return true;
}

static bool encode_plain(struct encoder *e, const char *text, size_t n) {
    return pretokenizer_run(&e->tok->pre, text, n, encode_word, e);
}

static size_t spaces_before(const char *text, size_t at) {
    while (at > 0) {
        size_t begin = at - 1;
        while (begin > 0 && ((unsigned char)text[begin] & 0xC0) == 0x80) begin--;
        uint32_t c;
        if (utf8_decode(text + begin, at - begin, &c) != at - begin || !(unicode_class(c) & UNICODE_SPACE)) break;
        at = begin;
    }
    return at;
}

static size_t spaces_after(const char *text, size_t n, size_t at) {
    while (at < n) {
        uint32_t c;
        size_t len = utf8_decode(text + at, n - at, &c);
        if (!(unicode_class(c) & UNICODE_SPACE)) break;
        at += len;
    }
    return at;
}

static const struct added_token *match_added(const struct added_set *set, const char *text, size_t n) {
    unsigned char b = (unsigned char)text[0];
    for (size_t i = set->start[b]; i < set->start[b + 1]; i++)
        if (set->tokens[i].n <= n && memcmp(set->tokens[i].text, text, set->tokens[i].n) == 0) return &set->tokens[i];
    return NULL;
}

// Cuts the set's tokens out of `text`; what lies between goes to `rest`. Leftmost and longest first. A special token
// that is to be plain text still hides matches inside it, as in the reference.
static bool encode_split(struct encoder *e, const struct added_set *set, const char *text, size_t n,
                         bool (*rest)(struct encoder *, const char *, size_t)) {
    size_t done = 0;
    for (size_t i = 0; set->n > 0 && i < n;) {
        const struct added_token *t = match_added(set, text + i, n - i);
        if (!t) {
            i++;
            continue;
        }
        size_t start = i, stop = i + t->n;
        i = stop;
        if (!e->special && e->tok->tokens[t->id].special) continue;
        if (t->lstrip) start = spaces_before(text, start);
        if (start < done) start = done;
        if (t->rstrip) stop = spaces_after(text, n, stop);
        if (done < start && !rest(e, text + done, start - done)) return false;
        if (!token_ids_append(e->out, &t->id, 1)) return false;
        done = stop;
    }
    return done >= n || rest(e, text + done, n - done);
}

static bool encode_normalized(struct encoder *e, const char *text, size_t n) {
    if (e->tok->nfc) {
        buffer_clear(&e->normal);
        if (!unicode_nfc(text, n, &e->normal)) return false;
        text = e->normal.data;
        n = e->normal.len;
    }
    return encode_split(e, &e->tok->normalized, text, n, encode_plain);
}

bool tokenizer_encode(const struct tokenizer *tok, const char *text, size_t n, bool special, struct token_ids *out,
                      struct error *err) {
    if (n > INT32_MAX / 4) return error_set(err, "tokenizer: a text of %zu bytes is longer than %d", n, INT32_MAX / 4);
    struct encoder e = {.tok = tok, .special = special, .out = out};
    size_t before = out->n;
    bool ok = encode_split(&e, &tok->raw, text, n, encode_normalized);
    bpe_scratch_free(&e.scratch);
    buffer_free(&e.normal);
    buffer_free(&e.spelt);
    if (ok) return true;
    out->n = before;
    return error_set(err, "tokenizer: out of memory for a text of %zu bytes", n);
}

bool tokenizer_decode(const struct tokenizer *tok, const int32_t *ids, size_t n, bool skip_special, struct buffer *out,
                      struct error *err) {
    for (size_t i = 0; i < n; i++) {
        size_t len;
        const char *bytes = tokenizer_token_bytes(tok, ids[i], &len);
        if (!bytes) return error_set(err, "tokenizer: id %d has no token (there are %d ids)", ids[i], tok->n_ids);
        if (skip_special && tok->tokens[ids[i]].special) continue;
        if (!buffer_append(out, bytes, len)) return error_set(err, "tokenizer: out of memory");
    }
    return true;
}

const char *tokenizer_token_bytes(const struct tokenizer *tok, int32_t id, size_t *n) {
    if (id < 0 || id >= tok->n_ids || !tok->tokens[id].content) return NULL;
    *n = tok->tokens[id].n_bytes;
    return tok->tokens[id].bytes;
}

bool tokenizer_is_special(const struct tokenizer *tok, int32_t id) {
    return id >= 0 && id < tok->n_ids && tok->tokens[id].special;
}

int32_t tokenizer_find(const struct tokenizer *tok, const char *text) {
    size_t n = strlen(text);
    int32_t id = tokenizer_find_content(tok, text, n);
    if (id >= 0 && tok->tokens[id].added) return id;
    struct buffer spelt = {0};
    bool ok = true;
    for (size_t i = 0; ok && i < n; i++) ok = utf8_append(&spelt, byte_character((unsigned char)text[i]));
    id = ok && n > 0 ? tokenizer_find_content(tok, spelt.data, spelt.len) : -1;
    buffer_free(&spelt);
    return id;
}

int32_t tokenizer_n_ids(const struct tokenizer *tok) {
    return tok->n_ids;
}

int32_t tokenizer_bos(const struct tokenizer *tok) {
    return tok->bos;
}

int32_t tokenizer_eos(const struct tokenizer *tok) {
    return tok->eos;
}

bool tokenizer_adds_bos(const struct tokenizer *tok) {
    return tok->adds_bos;
}

const char *tokenizer_chat_template(const struct tokenizer *tok) {
    return tok->chat_template;
}

const char *tokenizer_describe(const struct tokenizer *tok) {
    return tok->describe;
}
