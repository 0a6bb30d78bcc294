// quant.h: the dequantisers of GGUF's block types, for dtype.c alone.
//
// Each turns `n_blocks` packed blocks at `src` (any alignment) into n_blocks * block_len floats.
#ifndef TANDEM_FORMAT_QUANT_H
#define TANDEM_FORMAT_QUANT_H

#include <stddef.h>

void quant_q8_0_to_f32(const unsigned char *src, float *dst, size_t n_blocks);
void quant_q4_0_to_f32(const unsigned char *src, float *dst, size_t n_blocks);
void quant_q4_1_to_f32(const unsigned char *src, float *dst, size_t n_blocks);
void quant_q5_0_to_f32(const unsigned char *src, float *dst, size_t n_blocks);
void quant_q5_1_to_f32(const unsigned char *src, float *dst, size_t n_blocks);
void quant_q2_k_to_f32(const unsigned char *src, float *dst, size_t n_blocks);
void quant_q3_k_to_f32(const unsigned char *src, float *dst, size_t n_blocks);
void quant_q4_k_to_f32(const unsigned char *src, float *dst, size_t n_blocks);
void quant_q5_k_to_f32(const unsigned char *src, float *dst, size_t n_blocks);
void quant_q6_k_to_f32(const unsigned char *src, float *dst, size_t n_blocks);

#endif
