// error.c: formatting of error messages; see error.h.
#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

// Cuts a text that filled its buffer back to the last whole UTF-8 character.
static void trim_partial_character(char *text, size_t size) {
    size_t len = strlen(text);
    if (len + 1 < size) return;
    while (len > 0 && ((unsigned char)text[len - 1] & 0xC0) == 0x80) len--;
    if (len > 0 && (unsigned char)text[len - 1] >= 0xC0) len--;
    text[len] = '\0';
}

// Messages quote names from hostile files and end up on terminals: no control byte may reach those. Line ends and tabs
// stay.
static void mask_control_bytes(char *text) {
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if ((c < 0x20 && c != '\n' && c != '\t') || c == 0x7F) *text = '?';
    }
}

bool error_set(struct error *err, const char *format, ...) {
    if (!err) return false;
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    trim_partial_character(err->text, sizeof err->text);
    mask_control_bytes(err->text);
    return false;
}

bool error_prefix(struct error *err, const char *format, ...) {
    if (!err) return false;
    char joined[2 * sizeof err->text];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(joined, sizeof err->text, format, args);
    va_end(args);
    size_t used = n < 0 ? 0 : (size_t)n < sizeof err->text ? (size_t)n : sizeof err->text - 1;
    memcpy(joined + used, err->text, strlen(err->text) + 1);
    snprintf(err->text, sizeof err->text, "%.*s", (int)(sizeof err->text - 1), joined);
    trim_partial_character(err->text, sizeof err->text);
    mask_control_bytes(err->text);
    return false;
}
