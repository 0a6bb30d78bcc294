// fuzz_messages.c: chat documents of any bytes, rendered with every template. What is rendered must be well-formed
// UTF-8, its marks must lie inside it and name a special token, and writing a document and reading it back must change
// nothing that is rendered.
#include "text/template.h"

#include "base/utf8.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool ok) {
    if (!ok) abort();
}

static void check_text(const struct buffer *out, const struct template_marks *marks) {
    for (size_t at = 0, length; at < out->len; at += length) {
        uint32_t code;
        length = utf8_decode((const unsigned char *)out->data + at, out->len - at, &code);
        require(length > 0);
    }
    size_t at = 0;
    for (size_t i = 0; i < marks->n; i++) {
        struct template_mark m = marks->marks[i];
        require(m.offset >= at && m.offset <= out->len && m.length <= out->len - m.offset);
        require(m.length > 4 && memcmp(out->data + m.offset, "<|", 2) == 0);
        at = m.offset + m.length;
    }
}

static void render_all(const struct template_document *doc, const struct template_document *again,
                       struct template_options options) {
    for (int kind = TEMPLATE_QWEN3; kind <= TEMPLATE_CHATML; kind++) {
        struct buffer out = {0}, second = {0};
        struct template_marks marks = {0};
        struct error err = {""};
        bool ok = template_render((enum template_kind)kind, doc, options, &out, &marks, &err);
        require(ok == template_render((enum template_kind)kind, again, options, &second, NULL, NULL));
        if (ok) check_text(&out, &marks);
        else require(err.text[0] && out.len == 0 && marks.n == 0);
        require(out.len == second.len && (out.len == 0 || memcmp(out.data, second.data, out.len) == 0));
        template_marks_free(&marks);
        buffer_free(&out);
        buffer_free(&second);
    }
}

// The first byte chooses the options, the others are the document.
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) return 0;
    struct template_options options = {
        .enable_thinking = data[0] % 3 - 1, .add_generation_prompt = data[0] / 3 % 3 - 1, .continues = data[0] / 128};
    struct error err = {""};
    struct template_document *doc = template_parse((const char *)data + 1, size - 1, "input", &err);
    if (!doc) {
        require(err.text[0]);
        return 0;
    }
    struct buffer text = {0};
    require(template_write(doc, &text, &err));
    struct template_document *again = template_parse(buffer_text(&text), text.len, "written", &err);
    require(again);
    render_all(doc, again, options);
    template_document_free(again);
    template_document_free(doc);
    buffer_free(&text);
    return 0;
}
