// delta = rowsum(dO * O) - dLSE, what every gradient of a score loses: one simdgroup a row.
  const int query_length = out_shape[2];
  const int heads = out_shape[1];
  const int batch = int(threadgroup_position_in_grid.z);
  const int head = int(threadgroup_position_in_grid.y);
  const int my_query = int(threadgroup_position_in_grid.x) * SIMDGROUPS + int(simdgroup_index_in_threadgroup);
  const int row = min(my_query, query_length - 1);
  const device element_t* output = out + batch * out_strides[0] + head * out_strides[1] + row * out_strides[2];
  const device element_t* gradient = output_gradient + batch * output_gradient_strides[0] +
      head * output_gradient_strides[1] + row * output_gradient_strides[2];
  float sum = 0.0f;
  for (int column = int(thread_index_in_simdgroup); column < VALUE_DIM; column += 32) {
    sum += float(output[column * out_strides[3]]) * float(gradient[column * output_gradient_strides[3]]);
  }
  sum = simd_sum(sum);
  if (my_query < query_length && thread_index_in_simdgroup == 0) {
    const int64_t position = (int64_t(batch) * heads + head) * query_length + my_query;
    // The log-sum-exp of a row that sees no key is a constant.
    delta[position] = sum - (isinf(lse[position]) ? 0.0f : lse_gradient[position]);
  }
