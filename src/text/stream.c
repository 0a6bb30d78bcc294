// stream.c: see stream.h. Bytes pass three stages: whole characters, then stop strings, then <think> tags; each holds
// back only what could still become something else.
#include "text/stream.h"

#include "base/buffer.h"
#include "base/size.h"
#include "base/utf8.h"

#include <stdlib.h>
#include <string.h>

// One needle and how much of it the text fed so far ends with (Knuth, Morris, Pratt): linear in the text.
struct matcher {
    char *needle;   // [n]
    size_t *border; // [n + 1] border[i]: the longest proper border of needle[0..i)
    size_t n, matched;
};

// Where the text stands with respect to the one thinking block.
enum think_state {
    BEFORE, // only white space so far, or the beginning of <think>
    INSIDE,
    AFTER, // right behind </think>: newlines are dropped
    OUTSIDE
};

static const char OPEN[] = "<think>", CLOSE[] = "</think>";

struct stream {
    unsigned char partial[4]; // the beginning of a character
    size_t n_partial;

    struct matcher *stops; // [n_stops]
    size_t n_stops;
    struct buffer held; // from held_start on: text that may be the beginning of a stop string
    size_t held_start;
    const char *stop; // found

    bool split;
    enum think_state state;
    size_t tag_matched;  // bytes of OPEN (BEFORE) or CLOSE (INSIDE) that the text ends with
    struct buffer space; // white space in front of those, which goes if the tag completes
    bool begun;          // INSIDE: reasoning has begun; newlines before it are dropped

    struct buffer out; // what this call emits next
    enum stream_part part;
    bool failed; // out of memory
    stream_emit *emit;
    void *user;
};

static void matcher_free(struct matcher *m) {
    free(m->needle);
    free(m->border);
}

static bool matcher_init(struct matcher *m, const char *needle, struct error *err) {
    m->n = strlen(needle);
    if (m->n == 0) return error_set(err, "a stop string is empty");
    m->needle = size_alloc(m->n + 1, 1);
    m->border = size_alloc(m->n + 1, sizeof *m->border);
    if (!m->needle || !m->border) return error_set(err, "out of memory for a stop string");
    memcpy(m->needle, needle, m->n + 1);
    m->border[0] = m->border[1] = 0;
    for (size_t i = 1, k = 0; i < m->n; i++) {
        while (k && needle[i] != needle[k]) k = m->border[k];
        if (needle[i] == needle[k]) k++;
        m->border[i + 1] = k;
    }
    return true;
}

static bool matcher_feed(struct matcher *m, char c) {
    while (m->matched && (m->matched == m->n || m->needle[m->matched] != c)) m->matched = m->border[m->matched];
    if (m->needle[m->matched] == c) m->matched++;
    return m->matched == m->n;
}

// Stop strings are compared with text, so they are text themselves.
static bool is_utf8(const char *text) {
    size_t n = strlen(text), length;
    for (size_t i = 0; i < n; i += length) {
        uint32_t code = 0;
        length = utf8_decode((const unsigned char *)text + i, n - i, &code);
        if (length == 0) return false;
    }
    return true;
}

struct stream *stream_create(const struct stream_options *options, struct error *err) {
    struct stream *s = size_alloc_zero(1, sizeof *s);
    if (!s) {
        error_set(err, "out of memory for a text stream");
        return NULL;
    }
    s->split = options->split_thinking;
    s->state = options->starts_in_thinking ? INSIDE : BEFORE;
    s->stops = size_alloc_zero(options->n_stops, sizeof *s->stops);
    if (!s->stops) {
        error_set(err, "out of memory for %zu stop strings", options->n_stops);
        goto err;
    }
    s->n_stops = options->n_stops;
    for (size_t i = 0; i < s->n_stops; i++) {
        if (!is_utf8(options->stops[i])) {
            error_set(err, "stop string %zu is not valid UTF-8", i);
            goto err;
        }
        if (!matcher_init(&s->stops[i], options->stops[i], err)) goto err;
    }
    return s;
err:
    stream_free(s);
    return NULL;
}

void stream_free(struct stream *s) {
    if (!s) return;
    for (size_t i = 0; i < s->n_stops; i++) matcher_free(&s->stops[i]);
    free(s->stops);
    buffer_free(&s->held);
    buffer_free(&s->space);
    buffer_free(&s->out);
    free(s);
}

static void flush(struct stream *s) {
    if (s->out.len) s->emit(s->user, s->part, s->out.data, s->out.len);
    buffer_clear(&s->out);
}

static void give(struct stream *s, const char *text, size_t n) {
    enum stream_part part = s->split && s->state == INSIDE ? STREAM_REASONING : STREAM_CONTENT;
    if (n == 0) return;
    if (part != s->part) flush(s);
    s->part = part;
    if (!buffer_append(&s->out, text, n)) s->failed = true;
}

// The tag did not complete: what was held back is text.
static void give_held_tag(struct stream *s) {
    give(s, buffer_text(&s->space), s->space.len);
    give(s, s->state == BEFORE ? OPEN : CLOSE, s->tag_matched);
    if (s->tag_matched) s->begun = true;
    buffer_clear(&s->space);
    s->tag_matched = 0;
}

static void hold_space(struct stream *s, char c) {
    if (!buffer_append_byte(&s->space, c)) s->failed = true;
}

// One byte. '<' occurs only at the beginning of a tag, so that a failed tag can begin anew with the byte that broke it
// and nowhere else.
static void think_byte(struct stream *s, char c) {
    const char *tag = s->state == BEFORE ? OPEN : CLOSE;
    switch (s->state) {
    case BEFORE:
    case INSIDE:
        if (c == tag[s->tag_matched]) {
            if (tag[++s->tag_matched]) return;
            s->tag_matched = 0;
            buffer_clear(&s->space);
            s->state = s->state == BEFORE ? INSIDE : AFTER;
            return;
        }
        if (s->state == BEFORE) {
            if (s->tag_matched == 0 && (c == ' ' || c == '\n' || c == '\t' || c == '\r')) {
                hold_space(s, c);
                return;
            }
            give_held_tag(s);
            s->state = OUTSIDE;
            break;
        }
        if (s->tag_matched) give_held_tag(s);
        if (c == '<') {
            s->tag_matched = 1;
            return;
        }
        if (c == '\n') {
            if (s->begun) hold_space(s, c);
            return;
        }
        give_held_tag(s);
        s->begun = true;
        break;
    case AFTER:
        if (c == '\n') return;
        s->state = OUTSIDE;
        break;
    case OUTSIDE: break;
    }
    give(s, &c, 1);
}

static void think_feed(struct stream *s, const char *text, size_t n) {
    if (!s->split) {
        give(s, text, n);
        return;
    }
    size_t i = 0;
    while (i < n && s->state != OUTSIDE) think_byte(s, text[i++]);
    give(s, text + i, n - i);
}

// One whole character, through the stop strings.
static void stop_feed(struct stream *s, const char *text, size_t n) {
    if (s->n_stops == 0) {
        think_feed(s, text, n);
        return;
    }
    if (!buffer_append(&s->held, text, n)) {
        s->failed = true;
        return;
    }
    size_t keep = 0, found = 0;
    for (size_t j = 0; j < s->n_stops; j++) {
        struct matcher *m = &s->stops[j];
        bool hit = false;
        for (size_t i = 0; i < n; i++) hit = matcher_feed(m, text[i]);
        if (hit && m->n > found) {
            found = m->n;
            s->stop = m->needle;
        }
        if (m->matched > keep) keep = m->matched;
    }
    if (s->stop) keep = found;
    size_t ready = s->held.len - s->held_start - keep;
    think_feed(s, s->held.data + s->held_start, ready);
    s->held_start += ready;
    if (s->held_start > s->held.len / 2) { // moves each byte at most once on average
        s->held.len -= s->held_start;
        memmove(s->held.data, s->held.data + s->held_start, s->held.len);
        s->held_start = 0;
    }
}

bool stream_feed(struct stream *s, const char *bytes, size_t n, stream_emit *emit, void *user) {
    s->emit = emit;
    s->user = user;
    for (size_t i = 0; i < n && !s->stop; i++) {
        s->partial[s->n_partial++] = (unsigned char)bytes[i];
        while (s->n_partial && !s->stop) {
            uint32_t code = 0;
            size_t length = utf8_decode(s->partial, s->n_partial, &code);
            if (length == 0 && utf8_is_partial(s->partial, s->n_partial)) break;
            char character[4];
            size_t used = length;
            if (length) {
                memcpy(character, s->partial, length);
            } else {
                // A beginning that cannot be completed becomes one U+FFFD; the byte that broke it starts anew.
                used = s->n_partial > 1 ? s->n_partial - 1 : 1;
                length = utf8_encode(0xFFFD, character);
            }
            memmove(s->partial, s->partial + used, s->n_partial - used);
            s->n_partial -= used;
            stop_feed(s, character, length);
        }
    }
    flush(s);
    return !s->failed;
}

bool stream_finish(struct stream *s, stream_emit *emit, void *user) {
    s->emit = emit;
    s->user = user;
    if (s->n_partial && !s->stop) stop_feed(s, "\xEF\xBF\xBD", 3);
    s->n_partial = 0;
    if (!s->stop && s->held.len > s->held_start)
        think_feed(s, s->held.data + s->held_start, s->held.len - s->held_start);
    buffer_clear(&s->held);
    s->held_start = 0;
    if (s->split && (s->state == BEFORE || s->state == INSIDE)) give_held_tag(s);
    flush(s);
    return !s->failed;
}

bool stream_stopped(const struct stream *s) {
    return s->stop != NULL;
}

const char *stream_stop_text(const struct stream *s) {
    return s->stop;
}
