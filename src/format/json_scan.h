// json_scan.h: JSON read in place, for files that may be large and hostile: no tree is built.
//
// A text is first checked as a whole (json_scan_check), then read by a cursor. The check costs 8 bytes of memory for
// each key of the objects that are open, twice that while duplicates are sought; the cursor costs none. Small files,
// whose tree may be a hundred times their size, use json.h.
#ifndef TANDEM_FORMAT_JSON_SCAN_H
#define TANDEM_FORMAT_JSON_SCAN_H

#include "base/buffer.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { JSON_SCAN_MAX_DEPTH = 128 };

// Is this one JSON value (RFC 8259), and nothing else? Beyond the grammar, these are errors, as they are to json.h:
// duplicate keys (compared after their escapes are resolved), invalid UTF-8, lone surrogates, \u0000, integers that do
// not fit in 64 bits, other numbers that overflow a double, depth. Messages give `name`, line and column (in bytes).
// n is at most 4 GiB.
bool json_scan_check(const char *text, size_t n, const char *name, struct error *err);

// A place in a text that json_scan_check has accepted. The functions stay inside the text even when its bytes change
// meanwhile (a mapped file that somebody rewrites): what they return is then arbitrary, and every loop still ends.
struct json_cursor {
    const char *text;
    size_t n, at;
};

// What stands at the cursor: '{' '[' '"' 'i' (an integer) 'r' (another number) 't' 'f' 'n' (true, false, null); 0: the
// end of the text.
char json_cursor_type(struct json_cursor *c);
void json_cursor_enter(struct json_cursor *c); // into the object or array that stands here
// True: the cursor stands before the next member's key or the next item. False: it stands behind the bracket.
bool json_cursor_more(struct json_cursor *c);
// Replaces `out` by the key here and steps over its colon, or by the string here. False: no memory.
bool json_cursor_key(struct json_cursor *c, struct buffer *out);
bool json_cursor_text(struct json_cursor *c, struct buffer *out);
// The integer here, which it steps over. False, with the cursor where it was, when it is none, negative or too large.
bool json_cursor_size(struct json_cursor *c, size_t *out);
void json_cursor_skip(struct json_cursor *c); // the whole value here

#endif
