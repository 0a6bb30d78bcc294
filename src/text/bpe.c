// bpe.c: the vocabulary's tables and the merging of words.
#include "text/bpe.h"

#include "base/buffer.h"
#include "base/size.h"
#include "text/unicode.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

struct token {
    uint32_t text, n_text;   // in b->text
    uint32_t bytes, n_bytes; // in b->text as well
    bool present, added;
};

struct merge {
    int32_t left, right, joined;
};

struct bpe {
    struct buffer text; // token texts and bytes, one after the other
    struct token *tokens;
    int32_t n_ids, cap_ids;
    int32_t *by_text; // [text_slots] ids, -1 empty; open addressing
    size_t text_slots, n_tokens;
    struct merge *merges; // by rank
    size_t n_merges, cap_merges;
    uint32_t *by_pair; // [pair_slots] ranks, NO_MERGE empty; open addressing
    size_t pair_slots;
    int32_t byte_ids[256]; // -1: no token
    size_t longest;        // text of a token, in bytes
    bool ignore_merges, model_ended;
};

#define NO_MERGE UINT32_MAX

// The alphabet (source: the byte encoder of GPT-2's release): printable Latin-1 stands for itself, the other 68 bytes
// for U+0100 and on, in order.
static bool is_printable(unsigned byte) {
    return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

static uint32_t byte_to_char(unsigned byte) {
    if (is_printable(byte)) return byte;
    if (byte <= 0x20) return 0x100 + byte;
    return byte == 0xAD ? 0x143 : 0x121 + (byte - 0x7F); // 0x7F to 0xA0
}

static int char_to_byte(uint32_t c) { // -1: not in the alphabet
    if (c < 0x100) return is_printable(c) ? (int)c : -1;
    if (c <= 0x120) return (int)(c - 0x100);
    if (c <= 0x142) return (int)(c - 0x121 + 0x7F);
    return c == 0x143 ? 0xAD : -1;
}

static uint64_t hash_text(const char *text, size_t n) {
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)text[i]) * 0x100000001b3u;
    return h ^ h >> 29;
}

static uint64_t hash_pair(int32_t left, int32_t right) {
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9E3779B97F4A7C15u;
    return h ^ h >> 32;
}

struct bpe *bpe_create(void) {
    return calloc(1, sizeof(struct bpe));
}

void bpe_free(struct bpe *b) {
    if (!b) return;
    buffer_free(&b->text);
    free(b->tokens);
    free(b->by_text);
    free(b->merges);
    free(b->by_pair);
    free(b);
}

static size_t find_text_slot(const struct bpe *b, const char *text, size_t n) {
    size_t mask = b->text_slots - 1, slot = (size_t)hash_text(text, n) & mask;
    for (;; slot = (slot + 1) & mask) {
        int32_t id = b->by_text[slot];
        if (id < 0) return slot;
        const struct token *t = &b->tokens[id];
        if (t->n_text == n && memcmp(b->text.data + t->text, text, n) == 0) return slot;
    }
}

int32_t bpe_find(const struct bpe *b, const char *text, size_t n) {
    return b->text_slots ? b->by_text[find_text_slot(b, text, n)] : -1;
}

static bool grow_texts(struct bpe *b) {
    size_t slots = b->text_slots ? b->text_slots * 2 : 1024;
    int32_t *table = size_alloc(slots, sizeof *table);
    if (!table) return false;
    for (size_t i = 0; i < slots; i++) table[i] = -1;
    free(b->by_text);
    b->by_text = table;
    b->text_slots = slots;
    for (int32_t id = 0; id < b->n_ids; id++) {
        const struct token *t = &b->tokens[id];
        if (t->present) table[find_text_slot(b, b->text.data + t->text, t->n_text)] = id;
    }
    return true;
}

static bool grow_ids(struct bpe *b, int32_t id) {
    if (id >= b->cap_ids) {
        int32_t cap = id < 1024 ? 1024 : id > BPE_MAX_ID / 2 ? BPE_MAX_ID + 1 : 2 * id;
        struct token *tokens = size_realloc(b->tokens, (size_t)cap, sizeof *tokens);
        if (!tokens) return false;
        memset(tokens + b->cap_ids, 0, (size_t)(cap - b->cap_ids) * sizeof *tokens);
        b->tokens = tokens;
        b->cap_ids = cap;
    }
    if (id >= b->n_ids) b->n_ids = id + 1;
    return true;
}

// Appends the bytes that a text in the alphabet stands for; a text with any other character stands for itself.
static bool append_bytes(struct bpe *b, size_t text, size_t n, struct token *t) {
    size_t start = b->text.len;
    if (!buffer_reserve(&b->text, n)) return false;
    bool same = true;
    for (size_t i = 0; i < n;) {
        uint32_t c;
        i += unicode_decode(b->text.data + text + i, n - i, &c);
        int byte = char_to_byte(c);
        if (byte < 0) {
            same = true;
            break;
        }
        same = same && c < 0x80;
        if (!buffer_append_byte(&b->text, (char)byte)) return false;
    }
    if (same) { // share the text
        b->text.len = start;
        t->bytes = t->text;
        t->n_bytes = t->n_text;
        return true;
    }
    t->bytes = (uint32_t)start;
    t->n_bytes = (uint32_t)(b->text.len - start);
    return true;
}

bool bpe_add_token(struct bpe *b, int64_t id, const char *text, size_t n, struct error *err) {
    int shown = n < 60 ? (int)n : 60;
    if (id < 0 || id > BPE_MAX_ID)
        return error_set(err, "token \"%.*s\" has the id %" PRId64 ", expected 0 to %d", shown, text, id, BPE_MAX_ID);
    if (n > UINT32_MAX / 4 || b->text.len > UINT32_MAX / 2) return error_set(err, "the vocabulary's text is too large");
    if (b->n_tokens * 2 >= b->text_slots && !grow_texts(b)) return error_set(err, "vocabulary: out of memory");
    size_t slot = find_text_slot(b, text, n);
    if (b->by_text[slot] >= 0)
        return error_set(err, "token \"%.*s\" occurs twice, as id %d and as id %d", shown, text, b->by_text[slot],
                         (int)id);
    if (id < b->n_ids && b->tokens[id].present)
        return error_set(err, "id %d is given to two tokens, \"%.*s\" and \"%.*s\"", (int)id,
                         b->tokens[id].n_text < 60 ? (int)b->tokens[id].n_text : 60, b->text.data + b->tokens[id].text,
                         shown, text);
    size_t start = b->text.len;
    struct token t = {.text = (uint32_t)start, .n_text = (uint32_t)n, .present = true, .added = b->model_ended};
    if (!buffer_append(&b->text, text, n) || !append_bytes(b, start, n, &t) || !grow_ids(b, (int32_t)id))
        return error_set(err, "vocabulary: out of memory");
    b->tokens[id] = t;
    if (n > b->longest) b->longest = n;
    b->by_text[slot] = (int32_t)id;
    b->n_tokens++;
    return true;
}

static size_t find_pair_slot(const struct bpe *b, int32_t left, int32_t right) {
    size_t mask = b->pair_slots - 1, slot = (size_t)hash_pair(left, right) & mask;
    for (;; slot = (slot + 1) & mask) {
        uint32_t rank = b->by_pair[slot];
        if (rank == NO_MERGE || (b->merges[rank].left == left && b->merges[rank].right == right)) return slot;
    }
}

static uint32_t find_merge(const struct bpe *b, int32_t left, int32_t right) {
    return b->pair_slots ? b->by_pair[find_pair_slot(b, left, right)] : NO_MERGE;
}

static bool grow_pairs(struct bpe *b) {
    size_t slots = b->pair_slots ? b->pair_slots * 2 : 1024;
    uint32_t *table = size_alloc(slots, sizeof *table), *old = b->by_pair;
    size_t n_old = b->pair_slots;
    if (!table) return false;
    for (size_t i = 0; i < slots; i++) table[i] = NO_MERGE;
    b->by_pair = table;
    b->pair_slots = slots;
    for (size_t i = 0; i < n_old; i++) {
        if (old[i] != NO_MERGE) table[find_pair_slot(b, b->merges[old[i]].left, b->merges[old[i]].right)] = old[i];
    }
    free(old);
    return true;
}

bool bpe_add_merge(struct bpe *b, const char *left, size_t n_left, const char *right, size_t n_right,
                   struct error *err) {
    size_t rank = b->n_merges;
    int show_l = n_left < 60 ? (int)n_left : 60, show_r = n_right < 60 ? (int)n_right : 60;
    if (n_left == 0 || n_right == 0) return error_set(err, "merge %zu has an empty side", rank);
    struct merge m = {.left = bpe_find(b, left, n_left), .right = bpe_find(b, right, n_right)};
    if (m.left < 0) return error_set(err, "merge %zu names \"%.*s\", which is no token", rank, show_l, left);
    if (m.right < 0) return error_set(err, "merge %zu names \"%.*s\", which is no token", rank, show_r, right);
    char local[256], *joined = local;
    size_t n; // both sides are tokens, so the sum fits
    if (!size_add(n_left, n_right, &n)) return error_set(err, "merge %zu is too long", rank);
    if (n > sizeof local && !(joined = malloc(n))) return error_set(err, "merges: out of memory");
    memcpy(joined, left, n_left);
    memcpy(joined + n_left, right, n_right);
    m.joined = bpe_find(b, joined, n);
    if (joined != local) free(joined);
    if (m.joined < 0)
        return error_set(err, "merge %zu joins \"%.*s\" and \"%.*s\" to what is no token", rank, show_l, left, show_r,
                         right);
    if (rank >= NO_MERGE - 1) return error_set(err, "too many merges");
    if (b->n_merges * 2 >= b->pair_slots && !grow_pairs(b)) return error_set(err, "merges: out of memory");
    if (rank == b->cap_merges) {
        size_t cap = b->cap_merges ? b->cap_merges * 2 : 1024;
        struct merge *merges = size_realloc(b->merges, cap, sizeof *merges);
        if (!merges) return error_set(err, "merges: out of memory");
        b->merges = merges;
        b->cap_merges = cap;
    }
    size_t slot = find_pair_slot(b, m.left, m.right);
    if (b->by_pair[slot] != NO_MERGE)
        return error_set(err, "merge %zu, \"%.*s\" with \"%.*s\", repeats merge %u", rank, show_l, left, show_r, right,
                         b->by_pair[slot]);
    b->merges[rank] = m;
    b->by_pair[slot] = (uint32_t)rank;
    b->n_merges++;
    return true;
}

void bpe_end_model(struct bpe *b) {
    b->model_ended = true;
}

int bpe_finish(struct bpe *b, bool ignore_merges) {
    int missing = 0;
    for (unsigned byte = 0; byte < 256; byte++) {
        char text[4];
        size_t n = unicode_encode(byte_to_char(byte), text);
        b->byte_ids[byte] = bpe_find(b, text, n);
        if (b->byte_ids[byte] < 0) missing++;
    }
    b->ignore_merges = ignore_merges;
    return missing;
}

// The id of a word that is a token as a whole, in the alphabet; -1: none.
static int32_t find_alphabet(const struct bpe *b, const char *bytes, size_t n) {
    char local[512], *text = n <= sizeof local / 2 ? local : NULL;
    size_t room, len = 0;
    if (n == 0 || n > b->longest) return -1;
    if (!text && (!size_mul(n, 2, &room) || !(text = malloc(room)))) return -1;
    for (size_t i = 0; i < n; i++) len += unicode_encode(byte_to_char((unsigned char)bytes[i]), text + len);
    int32_t id = bpe_find(b, text, len);
    if (text != local) free(text);
    return id;
}

int32_t bpe_find_bytes(const struct bpe *b, const char *bytes, size_t n) {
    int32_t id = bpe_find(b, bytes, n); // a token outside the alphabet, or one that the alphabet leaves as it is
    if (id >= 0 && b->tokens[id].bytes == b->tokens[id].text) return id;
    return find_alphabet(b, bytes, n);
}

static const struct token *find_token(const struct bpe *b, int32_t id) {
    return id >= 0 && id < b->n_ids && b->tokens[id].present ? &b->tokens[id] : NULL;
}

const char *bpe_bytes(const struct bpe *b, int32_t id, size_t *n) {
    const struct token *t = find_token(b, id);
    *n = t ? t->n_bytes : 0;
    return t ? b->text.data + t->bytes : NULL;
}

const char *bpe_text(const struct bpe *b, int32_t id, size_t *n) {
    const struct token *t = find_token(b, id);
    *n = t ? t->n_text : 0;
    return t ? b->text.data + t->text : NULL;
}

int32_t bpe_n_ids(const struct bpe *b) {
    return b->n_ids;
}

size_t bpe_n_merges(const struct bpe *b) {
    return b->n_merges;
}

void bpe_merge(const struct bpe *b, size_t rank, int32_t *left, int32_t *right) {
    *left = b->merges[rank].left;
    *right = b->merges[rank].right;
}

// Merging. Always the pair of lowest rank, the leftmost where ranks tie.

struct bpe_symbol {
    int32_t id;          // -1: joined to an earlier symbol
    uint32_t prev, next; // NO_SYMBOL at the ends
};

#define NO_SYMBOL UINT32_MAX
enum { LONG_WORD = 4096 }; // from here on the table of ranks pays for itself

void bpe_scratch_free(struct bpe_scratch *s) {
    free(s->symbols);
    bpe_queue_free(&s->queue);
    *s = (struct bpe_scratch){0};
}

static bool reserve_symbols(struct bpe_scratch *s, size_t n) {
    if (n <= s->symbol_cap) return true;
    size_t cap = n < 64 ? 64 : n;
    struct bpe_symbol *symbols = size_realloc(s->symbols, cap, sizeof *symbols);
    if (!symbols) return false;
    s->symbols = symbols;
    s->symbol_cap = cap;
    return true;
}

// A short word: look at all pairs for each merge.
static size_t merge_short(const struct bpe *b, int32_t *ids, size_t n) {
    uint32_t ranks[32]; // of the pair that begins here
    for (size_t i = 0; i + 1 < n; i++) ranks[i] = find_merge(b, ids[i], ids[i + 1]);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++) {
            if (ranks[i] < ranks[best]) best = i;
        }
        if (ranks[best] == NO_MERGE) break;
        ids[best] = b->merges[ranks[best]].joined;
        n--;
        memmove(ids + best + 1, ids + best + 2, (n - best - 1) * sizeof *ids);
        if (best + 1 < n) {
            memmove(ranks + best + 1, ranks + best + 2, (n - best - 2) * sizeof *ranks);
            ranks[best] = find_merge(b, ids[best], ids[best + 1]);
        }
        if (best > 0) ranks[best - 1] = find_merge(b, ids[best - 1], ids[best]);
    }
    return n;
}

// A long word: a queue of pairs over a linked list. Entries are not removed when their pair goes; one that comes out
// counts only where its pair is still there.
static bool push_pair(const struct bpe *b, struct bpe_scratch *s, uint32_t at) {
    uint32_t next = s->symbols[at].next;
    if (next == NO_SYMBOL) return true;
    uint32_t rank = find_merge(b, s->symbols[at].id, s->symbols[next].id);
    return rank == NO_MERGE || bpe_queue_push(&s->queue, rank, at);
}

static bool merge_long(const struct bpe *b, struct bpe_scratch *s, size_t n) {
    if (!bpe_queue_start(&s->queue, n >= LONG_WORD ? b->n_merges : 0)) return false;
    for (uint32_t i = 0; i + 1 < n; i++) {
        if (!push_pair(b, s, i)) return false;
    }
    uint32_t rank, at;
    while (bpe_queue_pop(&s->queue, &rank, &at)) {
        const struct merge *m = &b->merges[rank];
        struct bpe_symbol *left = &s->symbols[at];
        if (left->id != m->left || left->next == NO_SYMBOL) continue;
        struct bpe_symbol *right = &s->symbols[left->next];
        if (right->id != m->right) continue;
        left->id = m->joined;
        right->id = -1;
        left->next = right->next;
        if (left->next != NO_SYMBOL) s->symbols[left->next].prev = at;
        if ((left->prev != NO_SYMBOL && !push_pair(b, s, left->prev)) || !push_pair(b, s, at)) return false;
    }
    return true;
}

static bool missing_byte(unsigned char byte, struct error *err) {
    return error_set(err, "the vocabulary has no token for the byte 0x%02X", byte);
}

bool bpe_encode(const struct bpe *b, const char *word, size_t n, struct bpe_scratch *scratch, struct token_ids *out,
                struct error *err) {
    int32_t ids[32];
    if (b->ignore_merges && (ids[0] = find_alphabet(b, word, n)) >= 0 && !b->tokens[ids[0]].added) {
        return token_ids_append(out, ids, 1) || error_set(err, "tokenising: out of memory");
    }
    if (n <= 32) {
        for (size_t i = 0; i < n; i++) {
            ids[i] = b->byte_ids[(unsigned char)word[i]];
            if (ids[i] < 0) return missing_byte((unsigned char)word[i], err);
        }
        return token_ids_append(out, ids, merge_short(b, ids, n)) || error_set(err, "tokenising: out of memory");
    }
    if (n >= NO_SYMBOL) return error_set(err, "tokenising: a word of %zu bytes, at most %u allowed", n, NO_SYMBOL - 1);
    if (!reserve_symbols(scratch, n)) return error_set(err, "tokenising: out of memory");
    for (uint32_t i = 0; i < n; i++) {
        int32_t id = b->byte_ids[(unsigned char)word[i]];
        if (id < 0) return missing_byte((unsigned char)word[i], err);
        scratch->symbols[i] = (struct bpe_symbol){id, i ? i - 1 : NO_SYMBOL, i + 1 < n ? i + 1 : NO_SYMBOL};
    }
    if (!merge_long(b, scratch, n)) return error_set(err, "tokenising: out of memory");
    for (uint32_t i = 0; i != NO_SYMBOL; i = scratch->symbols[i].next) {
        if (!token_ids_append(out, &scratch->symbols[i].id, 1)) return error_set(err, "tokenising: out of memory");
    }
    return true;
}
