// kv_order.c: a head's page of K or V in the order that a GPU's kernels read it (ops/cuda/kv.cuh), and in the host's:
// see kv_arrange in kv_page.h. Written from the description there, not shared with the kernels.
#include "ops/kv_page.h"

#include "format/fp8.h"

// [dim / 32][slots][32 channels], in whose rows the words of 16 bytes change places from two slots to the next two.
static void arrange_bf16(size_t dim, bool to_host, uint16_t *host, uint16_t *own) {
    for (size_t slot = 0; slot < KV_PAGE_TOKENS; slot++)
        for (size_t c = 0; c < dim; c++) {
            size_t word = (c / 8) % 4 ^ (slot >> 1 & 3);
            size_t at = (c / 32 * KV_PAGE_TOKENS + slot) * 32 + word * 8 + c % 8;
            if (to_host) host[slot * dim + c] = own[at];
            else own[at] = host[slot * dim + c];
        }
}

// Where the 16 bits of channel c, whose bit 3 is clear, and channel c + 8 stand.
static size_t pair_place(size_t dim, bool of_v, size_t slot, size_t c) {
    if (of_v) return (c / 16 * 32 + c % 8 * 4 + slot % 8 / 2) * 8 + slot / 8 * 2 + slot % 2;
    return ((slot / 8 * (dim / 32) + c / 32) * 32 + slot % 8 * 4 + c % 8 / 2) * 4 + c % 32 / 16 * 2 + c % 2;
}

static void arrange_fp8(size_t dim, bool of_v, bool to_host, unsigned char *host, unsigned char *own) {
    size_t blocks = dim / FP8_BLOCK;
    uint16_t *pairs = (uint16_t *)(void *)own;
    unsigned char *scales = own + KV_PAGE_TOKENS * dim;
    for (size_t slot = 0; slot < KV_PAGE_TOKENS; slot++) {
        unsigned char *row = host + slot * blocks * FP8_BLOCK_BYTES;
        for (size_t c = 0; c < dim; c++) {
            if (c & 8) continue;
            unsigned char *a = row + c / FP8_BLOCK * FP8_BLOCK_BYTES + 1 + c % FP8_BLOCK, *b = a + 8;
            uint16_t *w = &pairs[pair_place(dim, of_v, slot, c)];
            if (to_host) {
                *a = (unsigned char)((*w >> 8 & 0x80) | (*w >> 4 & 0x7F));
                *b = (unsigned char)((*w >> 4 & 0x80) | (*w >> 8 & 0x70) | (*w & 0x0F));
            } else {
                *w =
                    (uint16_t)((*a & 0x80) << 8 | (*a & 0x7F) << 4 | (*b & 0x80) << 4 | (*b & 0x70) << 8 | (*b & 0x0F));
            }
        }
        for (size_t i = 0; i < blocks; i++) {
            unsigned char *s =
                &scales[of_v ? i * KV_PAGE_TOKENS + slot % 8 / 2 * 8 + slot / 8 * 2 + slot % 2 : slot * blocks + i];
            if (to_host) row[i * FP8_BLOCK_BYTES] = *s;
            else *s = row[i * FP8_BLOCK_BYTES];
        }
    }
}

void kv_arrange(const struct kv_layer *kv, enum kv_side side, bool to_host, void *host, void *own) {
    if (kv->type == DTYPE_FP8) arrange_fp8(kv->head_dim, side == KV_V, to_host, host, own);
    else arrange_bf16(kv->head_dim, to_host, host, own);
}
