// Part of a kernel body: `element`, the gradients of this lane's element e of fragment n, for key number `key_index`.
        const int key_index = first_key + 8 * n + fragment_column(lane) + e;
#if HAS_SEGMENTS
        const int key_segment = segment_tile[key_index - first_key];
#else
        const int key_segment = 0;
#endif
        const bool seen = shown || is_visible(key_index, row, key_segment, terms);
        const ElementGradient element = element_gradient(
            products[n][e], weight_gradients[n][e], row_lse, row_delta, row, key_index, seen, terms);
