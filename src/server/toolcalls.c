// toolcalls.c: see toolcalls.h.
#include "server/toolcalls.h"

#include "base/arena.h"
#include "base/size.h"
#include "server/jsonscan.h"
#include "text/pyjson.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char OPEN[] = "<tool_call>", CLOSE[] = "</tool_call>";

enum state { TEXT, CALL, TAIL }; // TAIL: the object is complete, </tool_call> must come

struct toolcalls {
    struct toolcalls_sink sink;
    bool incremental, failed;
    bool behind_call; // nothing but white space came since a call
    enum state state;
    struct buffer held; // TEXT: white space and the beginning of <tool_call>; CALL, TAIL: the call as it was written
    size_t matched;     // bytes of OPEN or CLOSE that came
    struct jsonscan scan;
    struct buffer key; // CALL: the key or name in progress, with quotes
    bool is_name;      // the value in progress is that of "name"
    bool is_arguments; // ... of "arguments"
    bool has_name, has_arguments, begun;
    struct buffer name;
    size_t arguments, arguments_end, told; // offsets in held; told: what was reported
    char malformed[200];
};

struct toolcalls *toolcalls_create(const struct toolcalls_sink *sink, bool incremental, struct error *err) {
    struct toolcalls *t = size_alloc_zero(1, sizeof *t);
    if (!t) {
        error_set(err, "out of memory for tool calls");
        return NULL;
    }
    t->sink = *sink;
    t->incremental = incremental;
    return t;
}

void toolcalls_free(struct toolcalls *t) {
    if (!t) return;
    buffer_free(&t->held);
    buffer_free(&t->key);
    buffer_free(&t->name);
    free(t);
}

const char *toolcalls_malformed(const struct toolcalls *t) {
    return t->malformed[0] ? t->malformed : NULL;
}

static void hold(struct toolcalls *t, char c) {
    if (!buffer_append_byte(&t->held, c)) t->failed = true;
}

static void give_text(struct toolcalls *t) {
    if (t->held.len) t->sink.text(t->sink.user, t->held.data, t->held.len);
    buffer_clear(&t->held);
}

// The call is none: what it was written with is text, but for what was reported already.
static void give_up(struct toolcalls *t, const char *why) {
    if (!t->malformed[0]) snprintf(t->malformed, sizeof t->malformed, "%s", why);
    const char *from = t->begun ? t->held.data + t->told : t->held.data;
    size_t n = t->held.len - (t->begun ? t->told : 0);
    if (t->begun) t->sink.end(t->sink.user);
    if (n) t->sink.text(t->sink.user, from, n);
    buffer_clear(&t->held);
    t->state = TEXT;
    t->matched = 0;
}

static void begin_call(struct toolcalls *t) {
    t->state = CALL;
    t->matched = 0;
    t->scan = (struct jsonscan){0};
    t->is_name = t->is_arguments = t->has_name = t->has_arguments = t->begun = false;
    t->arguments = t->arguments_end = 0;
    buffer_clear(&t->key);
    buffer_clear(&t->name);
}

// A string literal's text. False: it holds a NUL or a lone surrogate.
static bool unquote(const struct buffer *literal, struct buffer *out) {
    struct arena arena = {0};
    struct pyjson *v = pyjson_parse(&arena, literal->data, literal->len, "name", NULL);
    buffer_clear(out);
    bool ok = v && v->type == PYJSON_STRING && strlen(v->text) == v->n_text && buffer_append(out, v->text, v->n_text);
    arena_free(&arena);
    return ok;
}

// Reports the name and as much of the arguments as came, if it is certain enough.
static bool report(struct toolcalls *t) {
    if (!t->has_name || !t->arguments) return true;
    if (!t->begun) {
        if (!t->sink.known(t->sink.user, buffer_text(&t->name))) {
            char why[120];
            snprintf(why, sizeof why, "there is no tool called \"%.60s\"", buffer_text(&t->name));
            give_up(t, why);
            return false;
        }
        t->sink.begin(t->sink.user, buffer_text(&t->name));
        t->begun = true;
        t->told = t->arguments;
    }
    size_t end = t->arguments_end ? t->arguments_end : t->held.len;
    if (end > t->told) t->sink.arguments(t->sink.user, t->held.data + t->told, end - t->told);
    if (end > t->told) t->told = end;
    return true;
}

// One byte of the object between the tags. `before`: the scanner's state in front of it.
static void follow(struct toolcalls *t, const struct jsonscan *before, char c) {
    const struct jsonscan *now = &t->scan;
    bool was_string = before->state == SCAN_STRING || before->state == SCAN_ESCAPE || before->state == SCAN_HEX ||
                      before->state == SCAN_UTF8;
    bool top = before->depth == 1;
    if (top && !was_string && now->state == SCAN_STRING && (now->key || t->is_name)) buffer_clear(&t->key);
    if (top && (was_string || now->state == SCAN_STRING) && (now->key || t->is_name))
        if (!buffer_append_byte(&t->key, c)) t->failed = true;
    if (top && before->state == SCAN_STRING && now->state == SCAN_COLON) { // a key is complete
        t->is_name = strcmp(buffer_text(&t->key), "\"name\"") == 0;
        t->is_arguments = strcmp(buffer_text(&t->key), "\"arguments\"") == 0;
    }
    if (t->is_arguments && !t->has_arguments && before->state == SCAN_VALUE && before->depth == 1 && c == '{') {
        t->arguments = t->held.len - 1;
        t->has_arguments = true;
    }
    bool closes = before->depth == 2 && now->depth == 1; // at the value's own } or ], inside which it was AFTER, too
    if (now->depth == 1 && now->state == SCAN_AFTER && (closes || before->state != SCAN_AFTER)) { // a value is complete
        if (t->is_name && !t->has_name && before->state == SCAN_STRING) t->has_name = unquote(&t->key, &t->name);
        if (t->is_arguments && t->arguments && !t->arguments_end) t->arguments_end = t->held.len;
        t->is_name = t->is_arguments = false;
    }
}

static void call_byte(struct toolcalls *t, char c) {
    struct jsonscan before = t->scan;
    hold(t, c);
    if (before.state == SCAN_VALUE && before.depth == 0 && c != '{' && c != ' ' && c != '\n' && c != '\t' &&
        c != '\r') {
        give_up(t, "the text between the tags is no JSON object");
        return;
    }
    if (!jsonscan_feed(&t->scan, (unsigned char)c)) {
        give_up(t, "the text between the tags is not valid JSON");
        return;
    }
    if (before.depth > 0) follow(t, &before, c);
    if (t->incremental && !report(t)) return;
    if (t->scan.state != SCAN_DONE) return;
    if (!t->has_name) give_up(t, "the call has no \"name\" that is a string");
    else if (!t->has_arguments) give_up(t, "the call has no \"arguments\" that are an object");
    else t->state = TAIL;
}

static void tail_byte(struct toolcalls *t, char c) {
    hold(t, c);
    bool space = c == ' ' || c == '\n' || c == '\t' || c == '\r';
    if (t->matched == 0 && space) return;
    if (c != CLOSE[t->matched]) {
        give_up(t, "the call does not end with </tool_call>");
        return;
    }
    if (CLOSE[++t->matched]) return;
    if (!report(t)) return;
    t->sink.end(t->sink.user);
    buffer_clear(&t->held);
    t->state = TEXT;
    t->matched = 0;
    t->behind_call = true;
}

// '<' occurs only at the beginning of the tag, so that a failed tag begins anew with the byte that broke it, if at all.
static void text_byte(struct toolcalls *t, char c) {
    bool space = c == ' ' || c == '\n' || c == '\t' || c == '\r';
    if (c == OPEN[t->matched]) {
        hold(t, c);
        if (OPEN[++t->matched]) return;
        // White space between text and a call belongs to neither: the template writes it.
        memmove(t->held.data, t->held.data + t->held.len - t->matched, t->matched);
        t->held.len = t->matched;
        begin_call(t);
        return;
    }
    if (t->matched) {
        give_text(t);
        t->matched = 0;
    }
    if (c == OPEN[0]) {
        hold(t, c);
        t->matched = 1;
        return;
    }
    hold(t, c);
    if (space) return;
    t->behind_call = false;
    give_text(t);
}

bool toolcalls_feed(struct toolcalls *t, const char *text, size_t n) {
    size_t plain = 0; // bytes that are certainly text are given in one piece
    for (size_t i = 0; i < n; i++) {
        if (t->state == TEXT && t->matched == 0 && t->held.len == 0) {
            plain = i;
            while (i < n && text[i] != '<' && text[i] != ' ' && text[i] != '\n' && text[i] != '\t' && text[i] != '\r')
                i++;
            if (i > plain) t->sink.text(t->sink.user, text + plain, i - plain);
            if (i == n) break;
        }
        if (t->state == TEXT) text_byte(t, text[i]);
        else if (t->state == CALL) call_byte(t, text[i]);
        else tail_byte(t, text[i]);
    }
    return !t->failed;
}

bool toolcalls_finish(struct toolcalls *t) {
    if (t->state != TEXT) give_up(t, "the call was not finished");
    else if (!t->behind_call || t->matched) give_text(t);
    return !t->failed;
}
