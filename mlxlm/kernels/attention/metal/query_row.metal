// Part of a kernel body: `row`, what belongs to this lane's query, which is number `my_query` or the last one.
  QueryRow row;
  row.index = min(my_query, query_length - 1);
#if HAS_BOUNDS
  row.low = row_bounds[2 * (batch * BOUNDS_BATCHED * query_length + row.index)];
  row.high = row_bounds[2 * (batch * BOUNDS_BATCHED * query_length + row.index) + 1];
#endif
#if HAS_SEGMENTS
  row.segment = query_segments[batch * QUERY_SEGMENTS_BATCHED * query_length + row.index];
#endif
#if HAS_DROPOUT
  row.dropout = dropout_row(
      dropout_words[0], dropout_words[1], (batch + dropout_words[2]) * dropout_words[3] + head + dropout_words[4],
      dropout_words[5] + uint(row.index));
#endif
