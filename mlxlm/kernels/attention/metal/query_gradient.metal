// dQ of a block of queries, and what the block adds to the gradient of its head's ALiBi slope.
//
// Each simdgroup owns 8 queries; tiles of K and V stream by. The weights come back from the saved log-sum-exp, and
// dS = P * (dO V^T - delta) with delta = rowsum(dO * O).
  const int query_length = query_shape[2];
  const int key_length = key_shape[2];
  const int heads = query_shape[1];
  const int batch = int(threadgroup_position_in_grid.z);
  const int head = int(threadgroup_position_in_grid.y);
  const int key_head = head / GROUP;
  const int query_blocks = int(threadgroups_per_grid.x);
  const int block = query_blocks - 1 - int(threadgroup_position_in_grid.x);
  const int first_query = block * BLOCK_QUERIES;
  const uint lane = thread_index_in_simdgroup;
  const uint thread_index = thread_index_in_threadgroup;
  const int first_row = 8 * int(simdgroup_index_in_threadgroup);
  const int my_query = first_query + first_row + fragment_row(lane);

  constexpr int KEY_FRAGMENTS = BLOCK_KEYS / 8;
#include "row_tiles.metal"
#include "matrices.metal"
#include "output_gradient.metal"
#include "score_terms.metal"
#include "query_row.metal"
#include "block_bounds.metal"
#include "load_rows.metal"

  float2 gradient[HEAD_PADDED / 8];
  UNROLL
  for (int d = 0; d < HEAD_PADDED / 8; ++d) gradient[d] = float2(0.0f);
#if HAS_ALIBI
  float slope_sum = 0.0f;
#endif

  const int last_key = bounds.last(terms);
  for (int first_key = bounds.first(terms) / BLOCK_KEYS * BLOCK_KEYS; first_key < last_key; first_key += BLOCK_KEYS) {
    if (bounds.hides(first_key, first_key + BLOCK_KEYS, terms)) continue;
    float2 products[KEY_FRAGMENTS];
    float2 weight_gradients[KEY_FRAGMENTS];
#include "row_products.metal"

    UNROLL
    for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      UNROLL
      for (int e = 0; e < 2; ++e) {
#include "row_element.metal"
        products[n][e] = element.product;
#if HAS_ALIBI
        slope_sum -= element.score * float(abs(row.index + terms.query_offset - key_index));
#endif
      }
    }
#if STREAMED_TILES == 1
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<BLOCK_KEYS, HEAD_DIM>(key_tile, keys, first_key, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
    accumulate<HEAD_DIM, KEY_FRAGMENTS>(gradient, products, key_tile, lane);
  }

  if (my_query < query_length) {
    const int64_t position = (int64_t(batch) * query_length + my_query) * heads + head;
    store_row<HEAD_DIM>(query_gradient + position * HEAD_DIM, gradient, SCALE, lane);
  }
#if HAS_ALIBI
  threadgroup float slope_sums[SIMDGROUPS];
  slope_sum = simd_sum(my_query < query_length ? slope_sum : 0.0f);
  if (lane == 0) slope_sums[simdgroup_index_in_threadgroup] = slope_sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index == 0) {
    float total = 0.0f;
    for (int i = 0; i < SIMDGROUPS; ++i) total += slope_sums[i];
    slope_gradient[(int64_t(batch) * heads + head) * query_blocks + block] = total;
  }
#endif
