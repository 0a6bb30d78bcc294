// template_batch.c: documents on stdin, each ended by a NUL, rendered to stdout, each ended by a NUL; a refused one
// gives "error: " and the message. For test_template.py, which holds the texts against Jinja2's.
#include "text/template.h"

#include <stdio.h>
#include <string.h>

int main(int argc, char **argv) {
    struct error err;
    enum template_kind kind;
    if (argc != 2 || !template_from_name(argv[1], &kind)) {
        fprintf(stderr, "usage: template_batch KIND, one of %s\n", template_names());
        return 2;
    }
    struct buffer in = {0}, out = {0};
    char chunk[65536];
    for (size_t n; (n = fread(chunk, 1, sizeof chunk, stdin)) > 0;)
        if (!buffer_append(&in, chunk, n)) return 1;
    for (size_t at = 0; at < in.len;) {
        size_t n = strnlen(in.data + at, in.len - at);
        struct template_document *doc = template_parse(in.data + at, n, "document", &err);
        buffer_clear(&out);
        if (!doc || !template_render(kind, doc, (struct template_options){-1, -1}, &out, NULL, &err)) {
            buffer_clear(&out);
            if (!buffer_printf(&out, "error: %s", err.text)) return 1;
        }
        template_document_free(doc);
        fwrite(buffer_text(&out), 1, out.len, stdout);
        fputc('\0', stdout);
        at += n + 1;
    }
    buffer_free(&in);
    buffer_free(&out);
    return 0;
}
