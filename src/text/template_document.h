// template_document.h: inside of a conversation, for the files of the template module alone.
#ifndef TANDEM_TEXT_TEMPLATE_DOCUMENT_H
#define TANDEM_TEXT_TEMPLATE_DOCUMENT_H

#include "base/arena.h"
#include "text/template.h"

struct template_document {
    struct arena arena;         // everything below lives in it
    struct pyjson *messages;    // an array
    const struct pyjson *tools; // an array, or NULL
    int enable_thinking;        // -1: absent, 0, 1
    int add_generation_prompt;  // -1: absent, 0, 1
};

#endif
