// Part of a kernel body: threadgroup memory of a kernel whose simdgroups own 8 queries each (dQ and biases).
#if ROWS_IN_REGISTERS
  RegisterRows<HEAD_DIM> query_rows;
  RegisterRows<VALUE_DIM> gradient_rows;
#else
  threadgroup element_t query_tile[BLOCK_QUERIES * HEAD_STRIDE];
  threadgroup element_t gradient_tile[BLOCK_QUERIES * VALUE_STRIDE];
#endif
#if STREAMED_TILES == 2
  threadgroup element_t key_tile[BLOCK_KEYS * HEAD_STRIDE];
  threadgroup element_t value_tile[BLOCK_KEYS * VALUE_STRIDE];
#else
  // K, V and K again take turns.
  threadgroup element_t key_tile[BLOCK_KEYS * (HEAD_STRIDE > VALUE_STRIDE ? HEAD_STRIDE : VALUE_STRIDE)];
  threadgroup element_t* const value_tile = key_tile;
#endif
#if HAS_RELATIVE_BIAS
  threadgroup float relative_tile[BLOCK_QUERIES + BLOCK_KEYS];
#endif
#if HAS_SEGMENTS
  threadgroup int segment_tile[BLOCK_KEYS];
#endif
