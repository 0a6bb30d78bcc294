// documents.h: standard input as documents: one, or several separated by NUL (-0).
#ifndef TANDEM_CLI_DOCUMENTS_H
#define TANDEM_CLI_DOCUMENTS_H

#include "base/buffer.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>

// Called for each document; false ends the loop with the error, which is reported with the document's number.
typedef bool document_fn(void *user, const char *text, size_t n, struct error *err);

// Splits `input` at NULs (a final NUL is optional) and calls fn for each. Returns the exit status.
int for_each_document(const struct buffer *input, document_fn *fn, void *user);

#endif
