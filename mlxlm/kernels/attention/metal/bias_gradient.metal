// The gradient of a dense bias, which is dS, summed over the axes along which the bias is broadcast.
//
// A threadgroup owns a tile of the bias: REDUCE_BATCH, REDUCE_HEADS, REDUCE_QUERIES and REDUCE_KEYS say over which axes
// it loops itself. So the sums have one writer and one order, and nothing larger than the bias is written.
  const int query_length = query_shape[2];
  const int key_length = key_shape[2];
  const int batches = query_shape[0];
  const int heads = query_shape[1];
  const int query_blocks = (query_length + BLOCK_QUERIES - 1) / BLOCK_QUERIES;
  const int owned_heads = REDUCE_HEADS ? 1 : heads;
  const int owned = int(threadgroup_position_in_grid.z);
  const int owned_block = int(threadgroup_position_in_grid.y);
  const int owned_key = int(threadgroup_position_in_grid.x) * BLOCK_KEYS;
  const uint lane = thread_index_in_simdgroup;
  const uint thread_index = thread_index_in_threadgroup;
  const int first_row = 8 * int(simdgroup_index_in_threadgroup);

  constexpr int KEY_FRAGMENTS = BLOCK_KEYS / 8;
#include "row_tiles.metal"
#if REDUCE_QUERIES
  threadgroup float column_sums[SIMDGROUPS * BLOCK_KEYS];
#endif

  float2 sums[KEY_FRAGMENTS];
  UNROLL
  for (int n = 0; n < KEY_FRAGMENTS; ++n) sums[n] = float2(0.0f);

  const int first_batch = REDUCE_BATCH ? 0 : owned / owned_heads;
  const int last_batch = REDUCE_BATCH ? batches : first_batch + 1;
  const int first_head = REDUCE_HEADS ? 0 : owned % owned_heads;
  const int last_head = REDUCE_HEADS ? heads : first_head + 1;
  const int first_block = REDUCE_QUERIES ? 0 : owned_block;
  const int last_block = REDUCE_QUERIES ? query_blocks : first_block + 1;
  for (int batch = first_batch; batch < last_batch; ++batch) {
    for (int head = first_head; head < last_head; ++head) {
      const int key_head = head / GROUP;
#include "matrices.metal"
#include "output_gradient.metal"
#include "score_terms.metal"
      for (int block = first_block; block < last_block; ++block) {
        const int first_query = block * BLOCK_QUERIES;
        const int my_query = first_query + first_row + fragment_row(lane);
#include "block_bounds.metal"
        const int from_key = REDUCE_KEYS ? bounds.first(terms) / BLOCK_KEYS * BLOCK_KEYS : owned_key;
        const int to_key = REDUCE_KEYS ? bounds.last(terms) : owned_key + BLOCK_KEYS;
        if (bounds.hides(from_key, to_key, terms)) continue;
#include "query_row.metal"
#if !ROWS_IN_REGISTERS
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the rows of the block before have been used
#endif
#include "load_rows.metal"
        for (int first_key = from_key; first_key < to_key; first_key += BLOCK_KEYS) {
          if (bounds.hides(first_key, first_key + BLOCK_KEYS, terms)) continue;
          float2 products[KEY_FRAGMENTS];
          float2 weight_gradients[KEY_FRAGMENTS];
#include "row_products.metal"
          UNROLL
          for (int n = 0; n < KEY_FRAGMENTS; ++n) {
            UNROLL
            for (int e = 0; e < 2; ++e) {
#include "row_element.metal"
              sums[n][e] += element.score;
            }
          }
        }
      }
    }
  }

#if REDUCE_QUERIES
  UNROLL
  for (int n = 0; n < KEY_FRAGMENTS; ++n) {
    UNROLL
    for (int e = 0; e < 2; ++e) {
      const float total = column_sum(sums[n][e]);
      const int column = 8 * n + fragment_column(lane) + e;
      if (fragment_row(lane) == 0) column_sums[int(simdgroup_index_in_threadgroup) * BLOCK_KEYS + column] = total;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#if REDUCE_KEYS
  if (thread_index == 0) {
    float total = 0.0f;
    for (int i = 0; i < SIMDGROUPS * BLOCK_KEYS; ++i) total += column_sums[i];
    bias_gradient[owned] = total;
  }
#else
  for (int i = int(thread_index); i < BLOCK_KEYS; i += THREADS) {
    float total = 0.0f;
    for (int group = 0; group < SIMDGROUPS; ++group) total += column_sums[group * BLOCK_KEYS + i];
    if (owned_key + i < key_length) bias_gradient[int64_t(owned) * key_length + owned_key + i] = total;
  }
#endif
#else
  const int row_index = owned_block * BLOCK_QUERIES + first_row + fragment_row(lane);
#if REDUCE_KEYS
  float total = 0.0f;
  UNROLL
  for (int n = 0; n < KEY_FRAGMENTS; ++n) total += sums[n].x + sums[n].y;
  total = row_sum(total);
  if (fragment_column(lane) == 0 && row_index < query_length) {
    bias_gradient[int64_t(owned) * query_length + row_index] = total;
  }
#else
  if (row_index < query_length) {
    device float* target = bias_gradient + (int64_t(owned) * query_length + row_index) * key_length;
    UNROLL
    for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      const int column = owned_key + 8 * n + fragment_column(lane);
      if (column < key_length) target[column] = sums[n].x;
      if (column + 1 < key_length) target[column + 1] = sums[n].y;
    }
  }
#endif
#endif
