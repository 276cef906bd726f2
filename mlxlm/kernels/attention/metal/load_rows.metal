// Part of a kernel body: this simdgroup's rows of Q and dO, and the statistics of this lane's row. What is staged here
// is first read after the barriers of row_products.metal.
#if ROWS_IN_REGISTERS
  query_rows.load(queries, first_query + first_row, lane);
  gradient_rows.load(output_gradients, first_query + first_row, lane);
#else
  stage<BLOCK_QUERIES, HEAD_DIM>(query_tile, queries, first_query, thread_index);
  stage<BLOCK_QUERIES, VALUE_DIM>(gradient_tile, output_gradients, first_query, thread_index);
  const int row_in_tile = first_row + fragment_row(lane);
  const ThreadgroupRows query_rows = {query_tile + row_in_tile * HEAD_STRIDE + fragment_column(lane)};
  const ThreadgroupRows gradient_rows = {gradient_tile + row_in_tile * VALUE_STRIDE + fragment_column(lane)};
#endif
  const int64_t statistics = (int64_t(batch) * heads + head) * query_length + row.index;
  // A row past the end has weights of 0: it must not add to what is summed over queries.
  const float saved_lse = lse[statistics];
  const float row_lse = my_query < query_length ? min(saved_lse, LARGEST_LSE) : LARGEST_LSE;
  const float row_delta = delta[statistics];
