// convert.h: a loaded model written as a GGUF file in other types: what `tandem quantize` does.
#ifndef TANDEM_MODEL_CONVERT_H
#define TANDEM_MODEL_CONVERT_H

#include "model/model.h"
#include "model/recipe.h"
#include "text/tokenizer.h"

#include <stdatomic.h>

struct convert_tensor { // what became of one tensor
    const char *name;   // in the file that was written; valid while the result is
    enum dtype from, to;
    size_t n_elements, n_bytes;
    double error; // RMS of the difference over RMS of the values; 0 where nothing was rounded
};

struct convert_result {
    struct convert_tensor *tensors; // [n]
    size_t n, n_bytes;              // of the whole file
    struct arena arena;
};
void convert_result_free(struct convert_result *r);

struct convert_options {
    const struct recipe *recipe;
    bool pure;
    const struct tokenizer *tokenizer; // of a folder; NULL: the file gets no vocabulary. A GGUF file's own is copied.
    struct pool *pool;                 // NULL: one thread
    const struct log *log;             // progress
    const atomic_bool *stop;           // set from outside: ends with an error; NULL: never
};

// Writes `path` with all metadata that llama.cpp needs. From GGUF all metadata is copied, and tensors that the model
// does not know are copied as they are. On failure nothing is left behind.
bool convert_model(const struct model *model, const char *path, const struct convert_options *options,
                   struct convert_result *result, struct error *err);

#endif
