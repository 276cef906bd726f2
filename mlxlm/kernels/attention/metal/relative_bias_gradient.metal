// The gradient of the relative bias: dS summed along diagonals, over all batch elements.
//
// A threadgroup owns a band of THREADS neighbouring diagonals of one head and walks along it, one block of queries
// after the other. The keys that the band crosses in a block, BLOCK_QUERIES + THREADS - 1 of them, come in tiles whose
// dS goes through threadgroup memory; each thread then adds up its own diagonal. One writer and one order a sum.
  const int query_length = query_shape[2];
  const int key_length = key_shape[2];
  const int batches = query_shape[0];
  const int heads = query_shape[1];
  const int head = int(threadgroup_position_in_grid.y);
  const int key_head = head / GROUP;
  const int diagonals = query_length + key_length - 1;
  const int first_diagonal = int(threadgroup_position_in_grid.x) * THREADS;
  const int query_blocks = (query_length + BLOCK_QUERIES - 1) / BLOCK_QUERIES;
  const uint lane = thread_index_in_simdgroup;
  const uint thread_index = thread_index_in_threadgroup;
  const int first_row = 8 * int(simdgroup_index_in_threadgroup);

  constexpr int KEY_FRAGMENTS = BLOCK_KEYS / 8;
  constexpr int SCORE_STRIDE = BLOCK_KEYS + 1;
#include "row_tiles.metal"
  threadgroup float score_tile[BLOCK_QUERIES * SCORE_STRIDE];

  float total = 0.0f;
  for (int batch = 0; batch < batches; ++batch) {
#include "matrices.metal"
#include "output_gradient.metal"
#include "score_terms.metal"
    for (int block = 0; block < query_blocks; ++block) {
      const int first_query = block * BLOCK_QUERIES;
      const int my_query = first_query + first_row + fragment_row(lane);
#include "block_bounds.metal"
      // Diagonal number t holds the keys query + t - (query_length - 1).
      const int from_key = first_query + first_diagonal - (query_length - 1);
      const int to_key = from_key + BLOCK_QUERIES + THREADS - 1;
      if (bounds.hides(from_key, to_key, terms)) continue;
#include "query_row.metal"
      // The rows of the block before were last read in front of the barrier that follows score_tile.
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
            score_tile[(first_row + fragment_row(lane)) * SCORE_STRIDE + key_index - first_key] = element.score;
          }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        // Row r of the tile meets this thread's diagonal in column r + start; score_tile is next written after the
        // barriers of the next tile.
        const int start = int(thread_index) - (first_key - from_key);
        const int last_row = min(BLOCK_QUERIES, BLOCK_KEYS - start);
        for (int r = max(0, -start); r < last_row; ++r) total += score_tile[r * SCORE_STRIDE + r + start];
      }
    }
  }
  const int diagonal = first_diagonal + int(thread_index);
  if (diagonal < diagonals) relative_bias_gradient[int64_t(head) * diagonals + diagonal] = total;
