// What a kernel is given: the same for the host, which fills it in, and for the GPU's code, which NVRTC compiles.
// All pointers are to GPU memory; a null one means that the operator has no such input or output. T is the type of the
// graph, M that of the modulation (gate, scale, shift) or of a norm's weight.
#pragma once

constexpr int kVector = 8;            // channels that a thread loads at once: 16 bytes of a half-precision type
constexpr int kVectorsPerThread = 2;  // that it keeps in registers
constexpr int kMostThreads = 1024;    // of a block

// sum = clip(x + gate · (y + bias + branch)), normed = norm(sum) · (offset + scale) + shift; one block for a token.
struct ResidualArguments {
  const void *x, *y, *bias, *branch;  // (B, S, C), (B, S, C), (C), (B, S, C) of T
  const void *gate, *scale, *shift;   // (B, 1, C) of M; scale and shift may also be (C)
  void *sum, *normed;                 // (B, S, C) of T
  int channels, tokens;               // C, S
  int modulation_step;                // C where scale and shift have a row for every sample, 0 where there is one row
  float epsilon, offset, limit;
};

// out = rotary(norm(x + bias) · weight), for text tokens and then for the others; one block for a token.
struct HeadArguments {
  const void *text, *text_bias, *text_weight;  // (B, L, N·H), (N·H) of T, weight of M
  const void *x, *bias, *weight;               // (B, S, N·H), (N·H) of T, weight of M
  const float *cos, *sin;                      // (L + S, H/2)
  void* out;                                   // (B, L + S, N·H) of T
  int channels, head;                          // N·H, H
  int text_tokens, tokens;                     // L, S
  int across;                                  // whether the norm is over all heads, and weight is (N·H) instead of (H)
  float epsilon;
};

// out = concat(first, gelu(h + bias + branch)) along the channels; one block for a token.
struct GeluArguments {
  const void *first, *h, *bias, *branch;  // (B, S, C), (B, S, M), (M), (B, S, M) of T
  void* out;                              // (B, S, C + M) of T
  int first_channels, channels;           // C, M
};

// quantised = x / scale in FP8 (E4M3), where the scale takes a row's largest number to 448; one block for a row.
struct QuantiseArguments {
  const void* x;    // (M, K) of T
  void* quantised;  // (M, K) of FP8
  float* scale;     // (M)
  int channels;     // K
};

// out = out · factor · row · column, for a product that was computed without its scales; one block for a row.
struct RescaleArguments {
  void* out;                    // (M, N) of T
  const float *rows, *columns;  // (M), (N)
  int channels;                 // N
  float factor;
};
