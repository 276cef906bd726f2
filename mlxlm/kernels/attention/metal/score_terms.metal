// Part of a kernel body: `terms` of `batch` and `head`.
  ScoreTerms terms;
  terms.query_length = query_length;
  terms.key_length = key_length;
#if HAS_PREFIX
  terms.prefix = prefix[batch * PREFIX_BATCHED];
#endif
#if HAS_ALIBI
  terms.slope = LOG2E * alibi_slopes[head];
  terms.query_offset = query_offset[batch * OFFSET_BATCHED];
#endif
#if HAS_RELATIVE_BIAS
#if RELATIVE_BIAS_STAGED
  terms.relative = relative_tile;
#else
  terms.relative = relative_bias + head * int64_t(query_length + key_length - 1);
#endif
#endif
#if HAS_BIAS
  terms.bias = bias + batch * bias_strides[0] + head * bias_strides[1];
  terms.bias_query_stride = bias_strides[2];
  terms.bias_key_stride = bias_strides[3];
#endif
#if HAS_DROPOUT
  terms.dropout_key_origin = dropout_words[6];
#endif
