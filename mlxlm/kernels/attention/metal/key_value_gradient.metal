// dK and dV of a block of keys, summed over all query heads that share the key head: no atomics, one writer.
//
// Each simdgroup owns 8 keys; tiles of Q and dO stream by. Rows of the fragments are keys and columns queries, so
// products are K Q^T and V dO^T. COMPUTE_DK and COMPUTE_DV say which of the two this run is for: heads that are too
// wide for both sums take two runs.
  const int query_length = query_shape[2];
  const int key_length = key_shape[2];
  const int heads = query_shape[1];
  const int key_heads = key_shape[1];
  const int batch = int(threadgroup_position_in_grid.z);
  const int key_head = int(threadgroup_position_in_grid.y);
  // With a causal mask the first block of keys is seen by most queries: it starts first.
  const int first_key = int(threadgroup_position_in_grid.x) * BLOCK_KEYS;
  const int query_blocks = (query_length + BLOCK_QUERIES - 1) / BLOCK_QUERIES;
  const uint lane = thread_index_in_simdgroup;
  const uint thread_index = thread_index_in_threadgroup;
  const int first_row = 8 * int(simdgroup_index_in_threadgroup);
  const int my_key = first_key + first_row + fragment_row(lane);

  constexpr int QUERY_FRAGMENTS = BLOCK_QUERIES / 8;
  constexpr int LARGER_STRIDE = HEAD_STRIDE > VALUE_STRIDE ? HEAD_STRIDE : VALUE_STRIDE;
#if STREAMED_TILES == 2
  threadgroup element_t query_tile[BLOCK_QUERIES * HEAD_STRIDE];
  threadgroup element_t gradient_tile[BLOCK_QUERIES * VALUE_STRIDE];
#else
  // Q, dO and Q again take turns.
  threadgroup element_t query_tile[BLOCK_QUERIES * LARGER_STRIDE];
  threadgroup element_t* const gradient_tile = query_tile;
#endif
  threadgroup float2 statistics_tile[BLOCK_QUERIES];
#if HAS_BOUNDS
  threadgroup int2 bounds_tile[BLOCK_QUERIES];
#endif
#if HAS_SEGMENTS
  threadgroup int segment_tile[BLOCK_QUERIES];
#endif
#if HAS_DROPOUT
  threadgroup uint dropout_tile[BLOCK_QUERIES];
#endif
#if HAS_RELATIVE_BIAS
  threadgroup float relative_tile[BLOCK_QUERIES + BLOCK_KEYS];
#endif

#if ROWS_IN_REGISTERS
  RegisterRows<HEAD_DIM> key_rows;
#if COMPUTE_DK
  RegisterRows<VALUE_DIM> value_rows;
#endif
#else
  threadgroup element_t key_tile[BLOCK_KEYS * HEAD_STRIDE];
  const ThreadgroupRows key_rows = {
      key_tile + (first_row + fragment_row(lane)) * HEAD_STRIDE + fragment_column(lane)};
#if COMPUTE_DK
  threadgroup element_t value_tile[BLOCK_KEYS * VALUE_STRIDE];
  const ThreadgroupRows value_rows = {
      value_tile + (first_row + fragment_row(lane)) * VALUE_STRIDE + fragment_column(lane)};
#endif
#endif
  {
    const int head = key_head * GROUP;
#include "matrices.metal"
#if ROWS_IN_REGISTERS
    key_rows.load(keys, first_key + first_row, lane);
#if COMPUTE_DK
    value_rows.load(values, first_key + first_row, lane);
#endif
#else
    stage<BLOCK_KEYS, HEAD_DIM>(key_tile, keys, first_key, thread_index);
#if COMPUTE_DK
    stage<BLOCK_KEYS, VALUE_DIM>(value_tile, values, first_key, thread_index);
#endif
#endif
  }
#if HAS_SEGMENTS
  const int key_segment =
      key_segments[batch * KEY_SEGMENTS_BATCHED * key_length + min(my_key, key_length - 1)];
#else
  const int key_segment = 0;
#endif

#if COMPUTE_DK
  float2 key_sum[HEAD_PADDED / 8];
  UNROLL
  for (int d = 0; d < HEAD_PADDED / 8; ++d) key_sum[d] = float2(0.0f);
#endif
#if COMPUTE_DV
  float2 value_sum[VALUE_PADDED / 8];
  UNROLL
  for (int d = 0; d < VALUE_PADDED / 8; ++d) value_sum[d] = float2(0.0f);
#endif

  for (int member = 0; member < GROUP; ++member) {
    const int head = key_head * GROUP + member;
#include "matrices.metal"
#include "output_gradient.metal"
#include "score_terms.metal"
    for (int block = 0; block < query_blocks; ++block) {
#include "block_bounds.metal"
      if (bounds.hides(first_key, first_key + BLOCK_KEYS, terms)) continue;
      const int first_query = block * BLOCK_QUERIES;

      threadgroup_barrier(mem_flags::mem_threadgroup);
      stage<BLOCK_QUERIES, HEAD_DIM>(query_tile, queries, first_query, thread_index);
#if STREAMED_TILES == 2
      stage<BLOCK_QUERIES, VALUE_DIM>(gradient_tile, output_gradients, first_query, thread_index);
#endif
      for (int i = int(thread_index); i < BLOCK_QUERIES; i += THREADS) {
        const int my_query = first_query + i;
#include "query_row.metal"
        const int64_t statistics = (int64_t(batch) * heads + head) * query_length + row.index;
        // A row past the end has weights of 0.
        const float saved_lse = lse[statistics];
        const float row_lse = my_query < query_length ? min(saved_lse, LARGEST_LSE) : LARGEST_LSE;
        statistics_tile[i] = float2(row_lse, delta[statistics]);
#if HAS_BOUNDS
        bounds_tile[i] = int2(row.low, row.high);
#endif
#if HAS_SEGMENTS
        segment_tile[i] = row.segment;
#endif
#if HAS_DROPOUT
        dropout_tile[i] = row.dropout;
#endif
      }
#if HAS_RELATIVE_BIAS
      terms.relative_origin = first_key - (first_query + BLOCK_QUERIES - 1);
      stage_diagonals<BLOCK_QUERIES + BLOCK_KEYS>(
          relative_tile, relative_bias + head * int64_t(query_length + key_length - 1), terms.relative_origin,
          query_length, key_length, thread_index);
#endif
      threadgroup_barrier(mem_flags::mem_threadgroup);

      float2 products[QUERY_FRAGMENTS];
      float2 weight_gradients[QUERY_FRAGMENTS];
      multiply_transposed<HEAD_DIM, QUERY_FRAGMENTS>(products, key_rows, query_tile, lane);
#if STREAMED_TILES == 1
      threadgroup_barrier(mem_flags::mem_threadgroup);
      stage<BLOCK_QUERIES, VALUE_DIM>(gradient_tile, output_gradients, first_query, thread_index);
      threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
#if COMPUTE_DK
      multiply_transposed<VALUE_DIM, QUERY_FRAGMENTS>(weight_gradients, value_rows, gradient_tile, lane);
#endif
      const bool shown = bounds.shows(first_key, first_key + BLOCK_KEYS, terms);
      UNROLL
      for (int n = 0; n < QUERY_FRAGMENTS; ++n) {
        UNROLL
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * n + fragment_column(lane) + e;
          QueryRow row;
          row.index = min(first_query + column, query_length - 1);
#if HAS_BOUNDS
          const int2 range = bounds_tile[column];
          row.low = range.x;
          row.high = range.y;
#endif
#if HAS_SEGMENTS
          row.segment = segment_tile[column];
#endif
#if HAS_DROPOUT
          row.dropout = dropout_tile[column];
#endif
          const float2 statistics = statistics_tile[column];
          const bool seen = shown || is_visible(my_key, row, key_segment, terms);
#if COMPUTE_DK
          const float weight_gradient = weight_gradients[n][e];
#else
          const float weight_gradient = 0.0f;
#endif
          const ElementGradient element = element_gradient(
              products[n][e], weight_gradient, statistics.x, statistics.y, row, my_key, seen, terms);
          products[n][e] = element.product;
          weight_gradients[n][e] = element.weight;
        }
      }
#if COMPUTE_DV
      accumulate<VALUE_DIM, QUERY_FRAGMENTS>(value_sum, weight_gradients, gradient_tile, lane);
#endif
#if COMPUTE_DK
#if STREAMED_TILES == 1
      threadgroup_barrier(mem_flags::mem_threadgroup);
      stage<BLOCK_QUERIES, HEAD_DIM>(query_tile, queries, first_query, thread_index);
      threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
      accumulate<HEAD_DIM, QUERY_FRAGMENTS>(key_sum, products, query_tile, lane);
#endif
    }
  }

  if (my_key < key_length) {
    const int64_t position = (int64_t(batch) * key_length + my_key) * key_heads + key_head;
#if COMPUTE_DK
    store_row<HEAD_DIM>(key_gradient + position * HEAD_DIM, key_sum, SCALE, lane);
#endif
#if COMPUTE_DV
    store_row<VALUE_DIM>(value_gradient + position * VALUE_DIM, value_sum, 1.0f, lane);
#endif
  }
