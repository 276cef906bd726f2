// Part of a kernel body: `bounds` of the block of queries number `block`.
#if HAS_BOUNDS
  const int bounds_offset = 4 * (batch * BOUNDS_BATCHED * query_blocks + block);
  const BlockBounds bounds = {
      block_bounds[bounds_offset], block_bounds[bounds_offset + 1], block_bounds[bounds_offset + 2],
      block_bounds[bounds_offset + 3]};
#else
  const BlockBounds bounds = {0, 0, key_length, key_length};
#endif
