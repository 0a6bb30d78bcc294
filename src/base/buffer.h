// buffer.h: a growable byte buffer. It owns its memory; what it holds is bytes, not necessarily UTF-8, but a NUL always
// follows the last byte, so that text can be used as a C string.
#ifndef TANDEM_BASE_BUFFER_H
#define TANDEM_BASE_BUFFER_H

#include <stdbool.h>
#include <stddef.h>

// All zero is a valid empty buffer. After a failed call the contents are as they were before it.
struct buffer {
    char *data; // NULL while nothing was ever stored
    size_t len;
    size_t cap;
};

// Each returns false when memory runs out or the size would overflow.
bool buffer_append(struct buffer *b, const void *bytes, size_t n);
bool buffer_append_text(struct buffer *b, const char *text); // a NUL-terminated string
bool buffer_append_byte(struct buffer *b, char byte);
bool buffer_printf(struct buffer *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
bool buffer_reserve(struct buffer *b, size_t extra); // room for `extra` more bytes and the NUL

const char *
buffer_text(const struct buffer *b); // the contents as a C string, "" when empty; valid until the next change
void buffer_clear(struct buffer *b); // keeps the memory
char *buffer_take(struct buffer *b); // hands the (malloc'ed) string to the caller, empties b; NULL: no memory
void buffer_free(struct buffer *b);

#endif
