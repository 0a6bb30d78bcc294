// diagnose_kv.h: what the KV pages should hold. K and V of a position depend on the tokens up to it and on nothing
// else, so the shadow keeps, for every prefix that was ever stored, the bits that belong there.
#ifndef TANDEM_DOCTOR_DIAGNOSE_KV_H
#define TANDEM_DOCTOR_DIAGNOSE_KV_H

#include "doctor/diagnose_walk.h"

struct kv_shadow;
struct kv_shadow *kv_shadow_create(const struct model_config *config, struct error *err);
void kv_shadow_free(struct kv_shadow *s); // NULL is fine

// After a store of k and v [n_tokens, n_kv_heads * head_dim]: do the slots hold them, rounded? Then they are
// remembered. False: finding is filled, or (finding empty) memory ran out.
bool kv_shadow_store(struct kv_shadow *s, const char *op, int layer, const struct kv_layer *kv, const struct batch *b,
                     const struct walk_sequence *const *of_seq, const float *k, const float *v, struct finding *f);

// Before attention reads: does every position of every sequence hold what was stored for its prefix?
bool kv_shadow_check(const struct kv_shadow *s, const char *op, int layer, const struct kv_layer *kv,
                     const struct batch *b, const struct walk_sequence *const *of_seq, struct finding *f);

#endif
