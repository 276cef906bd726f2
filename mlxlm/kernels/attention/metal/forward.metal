// O and the log-sum-exp (base 2) of a block of queries: one pass over the keys with a running maximum.
//
// Each simdgroup owns 8 queries. Q stays in threadgroup memory; tiles of K, then V, take turns in one buffer.
  const int query_length = query_shape[2];
  const int key_length = key_shape[2];
  const int heads = query_shape[1];
  const int batch = int(threadgroup_position_in_grid.z);
  const int head = int(threadgroup_position_in_grid.y);
  const int key_head = head / GROUP;
  const int query_blocks = int(threadgroups_per_grid.x);
  // With a causal mask the last block has most to do: it starts first.
  const int block = query_blocks - 1 - int(threadgroup_position_in_grid.x);
  const int first_query = block * BLOCK_QUERIES;
  const uint lane = thread_index_in_simdgroup;
  const uint thread_index = thread_index_in_threadgroup;
  const int first_row = 8 * int(simdgroup_index_in_threadgroup);
  const int my_query = first_query + first_row + fragment_row(lane);

  constexpr int KEY_FRAGMENTS = BLOCK_KEYS / 8;
  constexpr int VALUE_FRAGMENTS = VALUE_PADDED / 8;
  constexpr int SHARED_STRIDE = HEAD_STRIDE > VALUE_STRIDE ? HEAD_STRIDE : VALUE_STRIDE;
  threadgroup element_t query_tile[BLOCK_QUERIES * HEAD_STRIDE];
  threadgroup element_t key_value_tile[BLOCK_KEYS * SHARED_STRIDE];
#if HAS_RELATIVE_BIAS
  threadgroup float relative_tile[BLOCK_QUERIES + BLOCK_KEYS];
#endif
#if HAS_SEGMENTS
  threadgroup int segment_tile[BLOCK_KEYS];
#endif

#include "matrices.metal"
#include "score_terms.metal"
#include "query_row.metal"
#include "block_bounds.metal"

  stage<BLOCK_QUERIES, HEAD_DIM>(query_tile, queries, first_query, thread_index);
  const ThreadgroupRows query_rows = {
      query_tile + (first_row + fragment_row(lane)) * HEAD_STRIDE + fragment_column(lane)};

  float maximum = LOWEST;
  float sum = 0.0f;
  float2 output[VALUE_FRAGMENTS];
  UNROLL
  for (int d = 0; d < VALUE_FRAGMENTS; ++d) output[d] = float2(0.0f);

  const int last_key = bounds.last(terms);
  for (int first_key = bounds.first(terms) / BLOCK_KEYS * BLOCK_KEYS; first_key < last_key; first_key += BLOCK_KEYS) {
    if (bounds.hides(first_key, first_key + BLOCK_KEYS, terms)) continue;

    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<BLOCK_KEYS, HEAD_DIM>(key_value_tile, keys, first_key, thread_index);
#if HAS_RELATIVE_BIAS
    terms.relative_origin = first_key - (first_query + BLOCK_QUERIES - 1);
    stage_diagonals<BLOCK_QUERIES + BLOCK_KEYS>(
        relative_tile, relative_bias + head * int64_t(query_length + key_length - 1), terms.relative_origin,
        query_length, key_length, thread_index);
#endif
#if HAS_SEGMENTS
    for (int i = int(thread_index); i < BLOCK_KEYS; i += THREADS) {
      const int key_index = min(first_key + i, key_length - 1);
      segment_tile[i] = key_segments[batch * KEY_SEGMENTS_BATCHED * key_length + key_index];
    }
#endif
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float2 scores[KEY_FRAGMENTS];
    multiply_transposed<HEAD_DIM, KEY_FRAGMENTS>(scores, query_rows, key_value_tile, lane);
    UNROLL
    for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      UNROLL
      for (int e = 0; e < 2; ++e) {
        float cap_slope;
        scores[n][e] = score_of(scores[n][e], row, first_key + 8 * n + fragment_column(lane) + e, terms, cap_slope);
      }
    }
    if (!bounds.shows(first_key, first_key + BLOCK_KEYS, terms)) {
      UNROLL
      for (int n = 0; n < KEY_FRAGMENTS; ++n) {
        UNROLL
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * n + fragment_column(lane) + e;
#if HAS_SEGMENTS
          const int key_segment = segment_tile[column];
#else
          const int key_segment = 0;
#endif
          if (!is_visible(first_key + column, row, key_segment, terms)) scores[n][e] = MASKED;
        }
      }
    }

    float tile_maximum = maximum;
    UNROLL
    for (int n = 0; n < KEY_FRAGMENTS; ++n) tile_maximum = max(tile_maximum, max(scores[n].x, scores[n].y));
    tile_maximum = row_max(tile_maximum);
    const float rescale = fast::exp2(maximum - tile_maximum);
    maximum = tile_maximum;
    float tile_sum = 0.0f;
    UNROLL
    for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      UNROLL
      for (int e = 0; e < 2; ++e) {
        const float weight = fast::exp2(scores[n][e] - maximum);
        tile_sum += weight;
#if HAS_DROPOUT
        scores[n][e] = dropped(weight, row.dropout, first_key + 8 * n + fragment_column(lane) + e, terms);
#else
        scores[n][e] = weight;
#endif
      }
    }
    sum = sum * rescale + row_sum(tile_sum);
    UNROLL
    for (int d = 0; d < VALUE_FRAGMENTS; ++d) output[d] = output[d] * rescale;

    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<BLOCK_KEYS, VALUE_DIM>(key_value_tile, values, first_key, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    accumulate<VALUE_DIM, KEY_FRAGMENTS>(output, scores, key_value_tile, lane);
  }

#if HAS_SINKS
  // The sink is one more score, of a value that is 0.
  const float sink = LOG2E * sinks[head];
  const float total_maximum = max(maximum, sink);
  const float shrink = fast::exp2(maximum - total_maximum);
  const float total = sum * shrink + fast::exp2(sink - total_maximum);
#else
  const float total_maximum = maximum;
  const float shrink = 1.0f;
  const float total = sum;
#endif
  const bool empty = sum == 0.0f;
  if (my_query < query_length) {
    const int64_t position = (int64_t(batch) * query_length + my_query) * heads + head;
    store_row<VALUE_DIM>(out + position * VALUE_DIM, output, empty ? 0.0f : shrink / total, lane);
    if (fragment_column(lane) == 0) {
      lse[(int64_t(batch) * heads + head) * query_length + my_query] = empty ? INFINITY : total_maximum + log2(total);
    }
  }
