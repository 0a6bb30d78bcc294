// tripwire.h: what to say when a sequence's logits hold NaN or Inf: which op produced the first bad number.
#ifndef TANDEM_ENGINE_TRIPWIRE_H
#define TANDEM_ENGINE_TRIPWIRE_H

#include "engine/engine.h"

// A sequence whose K and V of positions 0 .. n - 1 are computed, and the logits of whose last token are not finite.
struct tripwire_sequence {
    const int32_t *ids;   // [n]
    const int32_t *pages; // its KV pages in order, at least those of n positions
    size_t n;
};

// Fills `err` with the first op, layer, position and channel that went bad. Finds them by computing one token again on
// the standard path, in memory of its own: neither the logits of the step in progress nor any KV is changed when it
// returns, so that other sequences go on as if nothing had happened. To be called before the sequence's KV is dropped,
// with the engine's lock held. It allocates: this is no path for speed.
void tripwire_explain(tandem_engine *engine, const struct tripwire_sequence *sequence, struct error *err);

#endif
