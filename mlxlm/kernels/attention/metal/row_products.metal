// Part of a kernel body: `products` = Q K^T and `weight_gradients` = dO V^T for the tile of keys at first_key, and
// what else the tile needs. Leaves K in key_tile unless the tiles take turns.
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<BLOCK_KEYS, HEAD_DIM>(key_tile, keys, first_key, thread_index);
#if STREAMED_TILES == 2
    stage<BLOCK_KEYS, VALUE_DIM>(value_tile, values, first_key, thread_index);
#endif
#if HAS_RELATIVE_BIAS
    terms.relative_origin = first_key - (first_query + BLOCK_QUERIES - 1);
    stage_diagonals<BLOCK_QUERIES + BLOCK_KEYS>(
        relative_tile, relative_bias + head * int64_t(query_length + key_length - 1), terms.relative_origin,
        query_length, key_length, thread_index);
#endif
#if HAS_SEGMENTS
    for (int i = int(thread_index); i < BLOCK_KEYS; i += THREADS) {
      const int key_index = clamp(first_key + i, 0, key_length - 1);
      segment_tile[i] = key_segments[batch * KEY_SEGMENTS_BATCHED * key_length + key_index];
    }
#endif
    threadgroup_barrier(mem_flags::mem_threadgroup);
    multiply_transposed<HEAD_DIM, KEY_FRAGMENTS>(products, query_rows, key_tile, lane);
#if STREAMED_TILES == 1
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<BLOCK_KEYS, VALUE_DIM>(value_tile, values, first_key, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
    multiply_transposed<VALUE_DIM, KEY_FRAGMENTS>(weight_gradients, gradient_rows, value_tile, lane);
    const bool shown = bounds.shows(first_key, first_key + BLOCK_KEYS, terms);
