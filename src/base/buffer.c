// buffer.c: see buffer.h.
#include "base/buffer.h"

#include "base/size.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool buffer_reserve(struct buffer *b, size_t extra) {
    size_t need;
    if (!size_add(b->len, extra, &need) || !size_add(need, 1, &need)) return false;
    if (need <= b->cap) return true;
    size_t cap = b->cap < 64 ? 64 : b->cap;
    while (cap < need) {
        if (!size_add(cap, cap / 2, &cap)) cap = need;
    }
    char *data = size_realloc(b->data, cap, 1);
    if (!data) return false;
    b->data = data;
    b->cap = cap;
    b->data[b->len] = '\0';
    return true;
}

bool buffer_append(struct buffer *b, const void *bytes, size_t n) {
    if (!buffer_reserve(b, n)) return false;
    if (n) memcpy(b->data + b->len, bytes, n);
    b->len += n;
    b->data[b->len] = '\0';
    return true;
}

bool buffer_append_text(struct buffer *b, const char *text) {
    return buffer_append(b, text, strlen(text));
}

bool buffer_append_byte(struct buffer *b, char byte) {
    return buffer_append(b, &byte, 1);
}

bool buffer_printf(struct buffer *b, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (n < 0 || !buffer_reserve(b, (size_t)n)) return false;
    va_start(args, format);
    vsnprintf(b->data + b->len, (size_t)n + 1, format, args);
    va_end(args);
    b->len += (size_t)n;
    return true;
}

const char *buffer_text(const struct buffer *b) {
    return b->data ? b->data : "";
}

void buffer_clear(struct buffer *b) {
    b->len = 0;
    if (b->data) b->data[0] = '\0';
}

char *buffer_take(struct buffer *b) {
    if (!buffer_reserve(b, 0)) return NULL;
    char *data = b->data;
    *b = (struct buffer){0};
    return data;
}

void buffer_free(struct buffer *b) {
    free(b->data);
    *b = (struct buffer){0};
}
