// Part of a kernel body: dO of `batch` and `head`.
  const Matrix output_gradients = {
      output_gradient + batch * output_gradient_strides[0] + head * output_gradient_strides[1],
      output_gradient_strides[2], output_gradient_strides[3], query_length};
