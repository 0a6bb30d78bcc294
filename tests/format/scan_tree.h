// scan_tree.h: what a cursor of json_scan.h sees, as a jansson tree: for the unit test and the fuzz target, which hold
// the two parsers against each other.
#ifndef TANDEM_TESTS_SCAN_TREE_H
#define TANDEM_TESTS_SCAN_TREE_H

#include "format/json.h"
#include "format/json_scan.h"

#include <stdlib.h>
#include <string.h>

// The value at the cursor, which steps over it. NULL: no memory, or what stands there is no value.
static inline json_t *scan_tree(struct json_cursor *c) {
    struct buffer text = {0};
    json_t *value = NULL;
    size_t size = 0, end;
    switch (json_cursor_type(c)) {
    case '{':
        value = json_object();
        for (json_cursor_enter(c); json_cursor_more(c);) {
            if (!json_cursor_key(c, &text)) break;
            json_object_set_new(value, buffer_text(&text), scan_tree(c));
        }
        break;
    case '[':
        value = json_array();
        for (json_cursor_enter(c); json_cursor_more(c);) json_array_append_new(value, scan_tree(c));
        break;
    case '"':
        if (json_cursor_text(c, &text)) value = json_stringn(buffer_text(&text), text.len);
        break;
    case 'i':
        if (json_cursor_size(c, &size) && size <= INT64_MAX) value = json_integer((json_int_t)size);
        else value = json_integer(strtoll(c->text + c->at, NULL, 10)); // negative
        if (c->text[c->at] == '-') json_cursor_skip(c);
        break;
    case 'r':
        end = c->at;
        json_cursor_skip(c);
        if (buffer_append(&text, c->text + end, c->at - end)) value = json_real(strtod(buffer_text(&text), NULL));
        break;
    case 't': value = json_true(), json_cursor_skip(c); break;
    case 'f': value = json_false(), json_cursor_skip(c); break;
    case 'n': value = json_null(), json_cursor_skip(c); break;
    default: break;
    }
    buffer_free(&text);
    return value;
}

// Do our scanner and jansson's parser agree on this text: refuse it, or read the same? They may differ in depth, in
// scalars, which jansson takes for no document, and in NULs, which it overlooks behind numbers.
static inline bool scan_agrees(const char *text, size_t n, const char **why) {
    struct error err = {""};
    struct json_cursor c = {text, n, 0};
    char type = json_cursor_type(&c);
    json_t *wanted = json_loadb(n ? text : "", n, JSON_REJECT_DUPLICATES, NULL), *found = NULL;
    bool ok = json_scan_check(text, n, "t", &err), agrees;
    if (!ok) {
        agrees = !wanted || strstr(err.text, "depth") || memchr(text, '\0', n);
        *why = agrees ? "" : "only the tree's parser accepts it";
    } else if (!wanted) {
        agrees = type != '{' && type != '[';
        *why = agrees ? "" : "only the scanner accepts it";
    } else {
        struct json_cursor skip = c = (struct json_cursor){text, n, 0};
        found = scan_tree(&c);
        json_cursor_skip(&skip);
        agrees = found && json_equal(found, wanted) && skip.at == c.at && json_cursor_type(&c) == '\0';
        *why = agrees ? "" : "they read different values";
    }
    json_decref(found);
    json_decref(wanted);
    return agrees;
}

#endif
