// Puts the splits of decode.metal together: one simdgroup a query and head.
  const int heads = partial_output_shape[1];
  const int query_length = partial_output_shape[2];
  const int my_query = int(threadgroup_position_in_grid.x);
  const int head = int(threadgroup_position_in_grid.y);
  const int batch = int(threadgroup_position_in_grid.z);
  const int64_t position = (int64_t(batch) * heads + head) * query_length + my_query;

  float maximum = LOWEST;
  for (int split = 0; split < SPLITS; ++split) {
    const float of_split = partial_statistics[2 * (position * SPLITS + split)];
    maximum = max(maximum, of_split);
  }
  float sum = 0.0f;
  for (int split = 0; split < SPLITS; ++split) {
    const int64_t slot = position * SPLITS + split;
    sum += fast::exp2(partial_statistics[2 * slot] - maximum) * partial_statistics[2 * slot + 1];
  }
  const bool empty = sum == 0.0f;
#if HAS_SINKS
  const float sink = LOG2E * sinks[head];
  const float total_maximum = max(maximum, sink);
  const float total = sum * fast::exp2(maximum - total_maximum) + fast::exp2(sink - total_maximum);
#else
  const float total_maximum = maximum;
  const float total = sum;
#endif
  for (int column = int(thread_index_in_simdgroup); column < VALUE_DIM; column += 32) {
    float value_sum = 0.0f;
    for (int split = 0; split < SPLITS; ++split) {
      const int64_t slot = position * SPLITS + split;
      value_sum += fast::exp2(partial_statistics[2 * slot] - total_maximum) * partial_output[slot * VALUE_DIM + column];
    }
    out[((int64_t(batch) * query_length + my_query) * heads + head) * VALUE_DIM + column] =
        element_t(empty ? 0.0f : value_sum / total);
  }
  if (thread_index_in_simdgroup == 0) lse[position] = empty ? INFINITY : total_maximum + log2(total);
