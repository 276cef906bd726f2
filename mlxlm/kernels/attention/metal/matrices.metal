// Part of a kernel body: where the matrices of `batch`, `head` and `key_head` are.
  const Matrix queries = {
      query + batch * query_strides[0] + head * query_strides[1], query_strides[2], query_strides[3], query_length};
  const Matrix keys = {
      key + batch * key_strides[0] + key_head * key_strides[1], key_strides[2], key_strides[3], key_length};
  const Matrix values = {
      value + batch * value_strides[0] + key_head * value_strides[1], value_strides[2], value_strides[3], key_length};
