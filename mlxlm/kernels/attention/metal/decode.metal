// A few queries against many keys: the keys are split over threadgroups, and within one over its simdgroups.
//
// The 8 rows of a simdgroup's fragments are the queries of all heads that are served together, QUERY_ROWS of them.
// There is nothing to share, so K and V go from device memory to registers: a lane loads HEAD_CHUNK neighbouring
// elements of two keys, and VALUE_CHUNK of a value. Which column of a fragment they become is our choice as long as Q,
// respectively O, agrees: chunk element f goes to fragment f.
  const int query_length = query_shape[2];
  const int key_length = key_shape[2];
  const int heads = query_shape[1];
  const int batch = int(threadgroup_position_in_grid.z);
  const int first_head = int(threadgroup_position_in_grid.y) * HEADS_TOGETHER;
  const int key_head = first_head / GROUP;
  const int split = int(threadgroup_position_in_grid.x);
  const int group_index = int(simdgroup_index_in_threadgroup);
  const uint lane = thread_index_in_simdgroup;
  const uint thread_index = thread_index_in_threadgroup;
  const int lane_row = fragment_row(lane);
  const int lane_column = fragment_column(lane);
  // Rows past the last repeat it; what they compute is dropped.
  const int my_row = min(lane_row, QUERY_ROWS - 1);
  const int head = first_head + my_row / query_length;
  const int my_query = my_row % query_length;
  const int query_blocks = 1;
  const int block = 0;

  constexpr int KEY_FRAGMENTS = BLOCK_KEYS / 8;
  constexpr int HEAD_PARTS = HEAD_PADDED / (8 * HEAD_CHUNK);
  constexpr int VALUE_PARTS = VALUE_PADDED / (4 * VALUE_CHUNK);
  constexpr int VALUE_FRAGMENTS = VALUE_CHUNK / 2;
  threadgroup element_t query_tile[QUERY_ROWS * HEAD_STRIDE];
  threadgroup float output_tile[SIMDGROUPS * QUERY_ROWS * VALUE_PADDED];
  threadgroup float2 statistics_tile[SIMDGROUPS * QUERY_ROWS];

#include "matrices.metal"
#include "score_terms.metal"
#include "query_row.metal"
#include "block_bounds.metal"

  for (int i = int(thread_index); i < QUERY_ROWS * HEAD_PADDED; i += THREADS) {
    const int r = i / HEAD_PADDED;
    const int column = i % HEAD_PADDED;
    element_t element = element_t(0.0f);
    if (column < HEAD_DIM) {
      element = query
          [batch * query_strides[0] + (first_head + r / query_length) * query_strides[1] +
           (r % query_length) * query_strides[2] + column * query_strides[3]];
    }
    query_tile[r * HEAD_STRIDE + column] = element;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // This split's share of the tiles that anybody sees.
  const int first_tile = bounds.first(terms) / BLOCK_KEYS;
  const int tiles = max(0, (bounds.last(terms) + BLOCK_KEYS - 1) / BLOCK_KEYS - first_tile);
  const int share = (tiles + SPLITS - 1) / SPLITS;
  const int last_tile = first_tile + min(tiles, (split + 1) * share);

  float maximum = LOWEST;
  float sum = 0.0f;
  float2 output[VALUE_PARTS * VALUE_FRAGMENTS];
  UNROLL
  for (int d = 0; d < VALUE_PARTS * VALUE_FRAGMENTS; ++d) output[d] = float2(0.0f);

  for (int tile = first_tile + split * share + group_index; tile < last_tile; tile += SIMDGROUPS) {
    const int first_key = tile * BLOCK_KEYS;
    if (bounds.hides(first_key, first_key + BLOCK_KEYS, terms)) continue;

    float2 scores[KEY_FRAGMENTS];
    UNROLL
    for (int n = 0; n < KEY_FRAGMENTS; ++n) scores[n] = float2(0.0f);
    UNROLL
    for (int part = 0; part < HEAD_PARTS; ++part) {
      const int query_column = 8 * HEAD_CHUNK * part + HEAD_CHUNK * lane_column;
      const int key_column = 8 * HEAD_CHUNK * part + HEAD_CHUNK * lane_row;
      UNROLL
      for (int n = 0; n < KEY_FRAGMENTS; ++n) {
        const int my_key = first_key + 8 * n + lane_column;
        const KeyChunk left = load_chunk<HEAD_CHUNK, HEAD_DIM>(keys, my_key, key_column);
        const KeyChunk right = load_chunk<HEAD_CHUNK, HEAD_DIM>(keys, my_key + 1, key_column);
        UNROLL
        for (int f = 0; f < HEAD_CHUNK; ++f) {
          const float2 query_fragment = float2(
              float(query_tile[my_row * HEAD_STRIDE + query_column + f]),
              float(query_tile[my_row * HEAD_STRIDE + query_column + HEAD_CHUNK + f]));
          const float2 key_fragment = float2(float(left.elements[f]), float(right.elements[f]));
          scores[n] = multiply_add(query_fragment, key_fragment, scores[n]);
        }
      }
    }

    const bool shown = bounds.shows(first_key, first_key + BLOCK_KEYS, terms);
    float tile_maximum = maximum;
    UNROLL
    for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      UNROLL
      for (int e = 0; e < 2; ++e) {
        const int my_key = first_key + 8 * n + lane_column + e;
#if HAS_SEGMENTS
        const int key_segment =
            key_segments[batch * KEY_SEGMENTS_BATCHED * key_length + min(my_key, key_length - 1)];
#else
        const int key_segment = 0;
#endif
        float cap_slope;
        const float score = score_of(scores[n][e], row, my_key, terms, cap_slope);
        scores[n][e] = shown || is_visible(my_key, row, key_segment, terms) ? score : MASKED;
        tile_maximum = max(tile_maximum, scores[n][e]);
      }
    }
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
        scores[n][e] = dropped(weight, row.dropout, first_key + 8 * n + lane_column + e, terms);
#else
        scores[n][e] = weight;
#endif
      }
    }
    sum = sum * rescale + row_sum(tile_sum);
    UNROLL
    for (int d = 0; d < VALUE_PARTS * VALUE_FRAGMENTS; ++d) output[d] = output[d] * rescale;

    UNROLL
    for (int n = 0; n < KEY_FRAGMENTS; ++n) {
      UNROLL
      for (int part = 0; part < VALUE_PARTS; ++part) {
        const int value_column = 4 * VALUE_CHUNK * part + VALUE_CHUNK * (lane_column / 2);
        const ValueChunk chunk =
            load_chunk<VALUE_CHUNK, VALUE_DIM>(values, first_key + 8 * n + lane_row, value_column);
        UNROLL
        for (int f = 0; f < VALUE_FRAGMENTS; ++f) {
          const float2 value_fragment = float2(float(chunk.elements[2 * f]), float(chunk.elements[2 * f + 1]));
          const int d = part * VALUE_FRAGMENTS + f;
          output[d] = multiply_add(scores[n], value_fragment, output[d]);
        }
      }
    }
  }

  // What the simdgroups found, put together.
  if (lane_row < QUERY_ROWS) {
    const int slot = group_index * QUERY_ROWS + lane_row;
    if (lane_column == 0) statistics_tile[slot] = float2(maximum, sum);
    UNROLL
    for (int part = 0; part < VALUE_PARTS; ++part) {
      UNROLL
      for (int f = 0; f < VALUE_FRAGMENTS; ++f) {
        const int column = 4 * VALUE_CHUNK * part + VALUE_CHUNK * (lane_column / 2) + 2 * f;
        output_tile[slot * VALUE_PADDED + column] = output[part * VALUE_FRAGMENTS + f].x;
        output_tile[slot * VALUE_PADDED + column + 1] = output[part * VALUE_FRAGMENTS + f].y;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(thread_index); i < QUERY_ROWS * VALUE_DIM; i += THREADS) {
    const int r = i / VALUE_DIM;
    const int column = i % VALUE_DIM;
    const int its_head = first_head + r / query_length;
    const int its_query = r % query_length;
    float all_maximum = LOWEST;
    for (int group = 0; group < SIMDGROUPS; ++group) {
      const float2 statistics = statistics_tile[group * QUERY_ROWS + r];
      all_maximum = max(all_maximum, statistics.x);
    }
    float all_sum = 0.0f;
    float value_sum = 0.0f;
    for (int group = 0; group < SIMDGROUPS; ++group) {
      const float2 statistics = statistics_tile[group * QUERY_ROWS + r];
      const float share_of_group = fast::exp2(statistics.x - all_maximum);
      all_sum += share_of_group * statistics.y;
      value_sum += share_of_group * output_tile[(group * QUERY_ROWS + r) * VALUE_PADDED + column];
    }
    const int64_t position = (int64_t(batch) * heads + its_head) * query_length + its_query;
#if SPLITS == 1
    const bool empty = all_sum == 0.0f;
#if HAS_SINKS
    const float sink = LOG2E * sinks[its_head];
    const float total_maximum = max(all_maximum, sink);
    const float shrink = fast::exp2(all_maximum - total_maximum);
    const float total = all_sum * shrink + fast::exp2(sink - total_maximum);
#else
    const float total_maximum = all_maximum;
    const float shrink = 1.0f;
    const float total = all_sum;
#endif
    out[((int64_t(batch) * query_length + its_query) * heads + its_head) * VALUE_DIM + column] =
        element_t(empty ? 0.0f : value_sum * (shrink / total));
    if (column == 0) lse[position] = empty ? INFINITY : total_maximum + log2(total);
#else
    partial_output[(position * SPLITS + split) * VALUE_DIM + column] = value_sum;
    if (column == 0) {
      partial_statistics[2 * (position * SPLITS + split)] = all_maximum;
      partial_statistics[2 * (position * SPLITS + split) + 1] = all_sum;
    }
#endif
  }
