// Shared by the kernels for one token. Python writes the constants of the configuration in front of this text, and on
// CUDA a few definitions that make Metal's words its own (source.py); both compilers read the same kernels.
//   element_t       the type of activations, and of weights that are not quantized
//   CHUNK           elements in 16 bytes, what a lane reads at once

constant constexpr float LOG2E = 1.4426950408889634f;
// A masked score, and where a running maximum starts: exp2(MASKED - LOWEST) is 0, and infinities never meet.
constant constexpr float MASKED = -3.0e38f;
constant constexpr float LOWEST = -1.5e38f;

struct alignas(16) Chunk {
  element_t elements[CHUNK];
};

struct alignas(16) Words {
  uint words[4];
};

// As it would have been written to memory and read again: the same rounding as without fusing.
METAL_FUNC float rounded(float x) {
  return float(element_t(x));
}

#if BITS
// The lowest BITS bits as a float: they become the end of a float's fraction, which costs less than a conversion.
METAL_FUNC float number(uint word) {
  return as_type<float>((word & uint((1 << BITS) - 1)) | 0x4b000000u) - 8388608.0f;
}
#endif
