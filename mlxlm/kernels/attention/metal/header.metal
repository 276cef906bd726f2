// Shared by all attention kernels: fragments, tiles in threadgroup memory, scores, visibility, dropout.
//
// Python writes the constants of the configuration in front of this text (see metal.py); nothing else varies. Names:
//   element_t                      the type of query, key, value and their gradients
//   HEAD_DIM, VALUE_DIM            widths; HEAD_PADDED and VALUE_PADDED are rounded up to a multiple of 8
//   BLOCK_QUERIES, BLOCK_KEYS      rows of a block on each side
//   SIMDGROUPS                     of a threadgroup; each owns 8 rows of the side that the threadgroup keeps
//   GROUP                          query heads that share a key head
//   HAS_...                        0 or 1: which parts of the contract this kernel serves
// Scores live in base 2: everything that is added to one is multiplied by log2(e), and weights are exp2(score - lse).
#include <metal_simdgroup_matrix>

#define UNROLL _Pragma("clang loop unroll(full)")

constant constexpr float LOG2E = 1.4426950408889634f;
// A masked score, and where a running maximum starts. exp2(MASKED - LOWEST) is 0, so a row that has seen nothing but
// masked keys has weights and a sum of 0 with no test, and infinities never meet.
constant constexpr float MASKED = -3.0e38f;
constant constexpr float LOWEST = -1.5e38f;
// Stands for a log-sum-exp of +inf in the backward pass, and for that of rows past the end: weights of 0.
constant constexpr float LARGEST_LSE = 3.0e38f;

constant constexpr int HEAD_PADDED = (HEAD_DIM + 7) / 8 * 8;
constant constexpr int VALUE_PADDED = (VALUE_DIM + 7) / 8 * 8;
constant constexpr int THREADS = 32 * SIMDGROUPS;
// 16 bytes after each row of a tile: rows of 64 or 128 elements would otherwise all begin in one memory bank, and
// loading a fragment, row by row or transposed, would take turns.
constant constexpr int ROW_PADDING = 16 / sizeof(element_t);
constant constexpr int HEAD_STRIDE = HEAD_PADDED + ROW_PADDING;
constant constexpr int VALUE_STRIDE = VALUE_PADDED + ROW_PADDING;

// ---------------------------------------------------------------------------------------------------- fragments
// A fragment is an 8 x 8 matrix spread over a simdgroup: a lane holds (row, column) and (row, column + 1).

METAL_FUNC int fragment_row(uint lane) {
  return int(((lane / 4) & 4) + (lane / 2) % 4);
}

METAL_FUNC int fragment_column(uint lane) {
  return int(((lane / 4) & 2) * 2 + (lane % 2) * 2);
}

// a * b + c for fragments.
METAL_FUNC float2 multiply_add(float2 a, float2 b, float2 c) {
  simdgroup_matrix<float, 8, 8> a_matrix, b_matrix, c_matrix, d_matrix;
  reinterpret_cast<thread float2&>(a_matrix.thread_elements()) = a;
  reinterpret_cast<thread float2&>(b_matrix.thread_elements()) = b;
  reinterpret_cast<thread float2&>(c_matrix.thread_elements()) = c;
  simdgroup_multiply_accumulate(d_matrix, a_matrix, b_matrix, c_matrix);
  return reinterpret_cast<thread float2&>(d_matrix.thread_elements());
}

// Over the four lanes that hold one row of a fragment.
METAL_FUNC float row_max(float x) {
  x = max(x, simd_shuffle_xor(x, ushort(1)));
  return max(x, simd_shuffle_xor(x, ushort(8)));
}

METAL_FUNC float row_sum(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  return x + simd_shuffle_xor(x, ushort(8));
}

// Over the eight lanes that hold one column of a fragment.
METAL_FUNC float column_sum(float x) {
  x += simd_shuffle_xor(x, ushort(2));
  x += simd_shuffle_xor(x, ushort(4));
  return x + simd_shuffle_xor(x, ushort(16));
}

// ------------------------------------------------------------------------------------------------------- tiles

// Where rows of a matrix in device memory are, for one head of one batch element.
struct Matrix {
  const device element_t* data;
  int64_t row_stride;
  int64_t column_stride;
  int rows;
};

struct Chunk {
  element_t elements[ROW_PADDING];  // 16 bytes, with the alignment of one element
};

// All threads of the threadgroup copy rows first .. first + ROWS - 1 into a tile. Rows outside of the matrix and
// columns past WIDTH become 0, so that they add nothing to a product. A barrier before and after is the caller's.
template <int ROWS, int WIDTH>
METAL_FUNC void stage(threadgroup element_t* tile, Matrix source, int first, uint thread_index) {
  constexpr int CHUNK = ROW_PADDING;
  constexpr int PADDED = (WIDTH + 7) / 8 * 8;
  constexpr int STRIDE = PADDED + ROW_PADDING;
  if (WIDTH == PADDED && source.column_stride == 1) {
    constexpr int CHUNKS = PADDED / CHUNK;
    for (int i = int(thread_index); i < ROWS * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS;
      const int column = i % CHUNKS * CHUNK;
      Chunk chunk;
      if (first + row >= 0 && first + row < source.rows) {
        chunk = *(const device Chunk*)(source.data + (first + row) * source.row_stride + column);
      } else {
        UNROLL
        for (int e = 0; e < CHUNK; ++e) chunk.elements[e] = element_t(0.0f);
      }
      *(threadgroup Chunk*)(tile + row * STRIDE + column) = chunk;
    }
  } else {
    for (int i = int(thread_index); i < ROWS * PADDED; i += THREADS) {
      const int row = i / PADDED;
      const int column = i % PADDED;
      element_t value = element_t(0.0f);
      if (first + row >= 0 && first + row < source.rows && column < WIDTH) {
        value = source.data[(first + row) * source.row_stride + column * source.column_stride];
      }
      tile[row * STRIDE + column] = value;
    }
  }
}

// Eight rows that a simdgroup multiplies with every tile it meets, kept in registers in their own type ...
template <int WIDTH>
struct RegisterRows {
  struct Pair {
    element_t x;
    element_t y;
  };
  Pair pairs[(WIDTH + 7) / 8];

  METAL_FUNC void load(Matrix source, int first, uint lane) thread {
    const int row = first + fragment_row(lane);
    UNROLL
    for (int d = 0; d < (WIDTH + 7) / 8; ++d) {
      const int column = 8 * d + fragment_column(lane);
      Pair pair = {element_t(0.0f), element_t(0.0f)};
      if (row >= 0 && row < source.rows) {
        const int64_t offset = row * source.row_stride + column * source.column_stride;
        if (column < WIDTH) pair.x = source.data[offset];
        if (column + 1 < WIDTH) pair.y = source.data[offset + source.column_stride];
      }
      pairs[d] = pair;
    }
  }

  METAL_FUNC float2 part(int d) const thread {
    return float2(float(pairs[d].x), float(pairs[d].y));
  }
};

// ... or in threadgroup memory. `element` points at this lane's element of the first fragment.
struct ThreadgroupRows {
  const threadgroup element_t* element;

  METAL_FUNC float2 part(int d) const thread {
    return float2(float(element[8 * d]), float(element[8 * d + 1]));
  }
};

// products[n] = rows * (rows 8n .. 8n + 7 of the tile)^T, for a tile of COUNT * 8 rows.
template <int WIDTH, int COUNT, typename Rows>
METAL_FUNC void multiply_transposed(
    thread float2* products, const thread Rows& rows, const threadgroup element_t* tile, uint lane) {
  constexpr int STRIDE = (WIDTH + 7) / 8 * 8 + ROW_PADDING;
  // The fragment of the transposed tile: its row is a column of the tile.
  const threadgroup element_t* element = tile + fragment_column(lane) * STRIDE + fragment_row(lane);
  UNROLL
  for (int n = 0; n < COUNT; ++n) products[n] = float2(0.0f);
  UNROLL
  for (int d = 0; d < (WIDTH + 7) / 8; ++d) {
    const float2 left = rows.part(d);
    UNROLL
    for (int n = 0; n < COUNT; ++n) {
      const float2 right = float2(float(element[8 * n * STRIDE + 8 * d]), float(element[(8 * n + 1) * STRIDE + 8 * d]));
      products[n] = multiply_add(left, right, products[n]);
    }
  }
}

// sums[d] += weights * (columns 8d .. 8d + 7 of the tile), for a tile of COUNT * 8 rows.
template <int WIDTH, int COUNT>
METAL_FUNC void accumulate(
    thread float2* sums, const thread float2* weights, const threadgroup element_t* tile, uint lane) {
  constexpr int STRIDE = (WIDTH + 7) / 8 * 8 + ROW_PADDING;
  const threadgroup element_t* element = tile + fragment_row(lane) * STRIDE + fragment_column(lane);
  UNROLL
  for (int d = 0; d < (WIDTH + 7) / 8; ++d) {
    UNROLL
    for (int n = 0; n < COUNT; ++n) {
      const float2 right = float2(float(element[8 * n * STRIDE + 8 * d]), float(element[8 * n * STRIDE + 8 * d + 1]));
      sums[d] = multiply_add(weights[n], right, sums[d]);
    }
  }
}

// Results that are sums over all launches come from each in float32.
#if PARTIAL
typedef float result_t;
#else
typedef element_t result_t;
#endif

// Writes eight rows of a result, this lane's part of them, times `factor`; `target` points at the lane's row.
template <int WIDTH>
METAL_FUNC void store_row(device result_t* target, const thread float2* sums, float factor, uint lane) {
  UNROLL
  for (int d = 0; d < (WIDTH + 7) / 8; ++d) {
    const int column = 8 * d + fragment_column(lane);
    if (column < WIDTH) target[column] = result_t(sums[d].x * factor);
    if (column + 1 < WIDTH) target[column + 1] = result_t(sums[d].y * factor);
  }
}

// ------------------------------------------------------------------------------------------------------ scores

// What the scores of one query head in one batch element depend on besides the products.
struct ScoreTerms {
  int query_length;
  int key_length;
#if HAS_PREFIX
  int prefix;  // keys below it are visible to every query
#endif
#if HAS_ALIBI
  float slope;  // times log2(e)
  int query_offset;
#endif
#if HAS_RELATIVE_BIAS
#if RELATIVE_BIAS_STAGED
  const threadgroup float* relative;  // diagonals of the tile at hand, times log2(e) ...
  int relative_origin;                // ... of which this is number 0, as key - query
#else
  const device float* relative;  // all diagonals of the head
#endif
#endif
#if HAS_BIAS
  const device bias_t* bias;
  int64_t bias_query_stride;
  int64_t bias_key_stride;
#endif
#if HAS_DROPOUT
  uint dropout_key_origin;  // number of the first key in the whole call, of which this launch may see a part
#endif
};

// What belongs to one query of that head. index never leaves the array: rows past its end repeat the last query.
struct QueryRow {
  int index;
#if HAS_BOUNDS
  int low;  // keys low .. high - 1 are visible
  int high;
#endif
#if HAS_SEGMENTS
  int segment;
#endif
#if HAS_DROPOUT
  uint dropout;  // the row's word of the hash
#endif
};

// The score of a product q.k in base 2, and in `cap_slope` the derivative of the soft-cap there (1 without one).
METAL_FUNC float score_of(
    float product, const thread QueryRow& row, int key, const thread ScoreTerms& terms, thread float& cap_slope) {
  float score = product * PRODUCT_SCALE;
  cap_slope = 1.0f;
#if HAS_SOFTCAP
  const float bounded = precise::tanh(score);
  cap_slope = 1.0f - bounded * bounded;
  score = bounded * SOFTCAP_LOG2E;
#endif
#if HAS_ALIBI
  score -= terms.slope * float(abs(row.index + terms.query_offset - key));
#endif
#if HAS_RELATIVE_BIAS
#if RELATIVE_BIAS_STAGED
  score += terms.relative[key - row.index - terms.relative_origin];
#else
  score += LOG2E * terms.relative[clamp(key, 0, terms.key_length - 1) - row.index + terms.query_length - 1];
#endif
#endif
#if HAS_BIAS
  const int64_t offset =
      row.index * terms.bias_query_stride + clamp(key, 0, terms.key_length - 1) * terms.bias_key_stride;
  score += LOG2E * float(terms.bias[offset]);
#endif
  return score;
}

// Whether a key that may be past the end, or before the start, is there for the query to see.
METAL_FUNC bool is_visible(int key, const thread QueryRow& row, int key_segment, const thread ScoreTerms& terms) {
#if HAS_BOUNDS
  bool seen = key >= row.low && key < row.high;
#if HAS_PREFIX
  seen = seen || (key >= 0 && key < terms.prefix);
#endif
#else
  bool seen = key >= 0 && key < terms.key_length;
#endif
#if HAS_SEGMENTS
  seen = seen && row.segment == key_segment;
#endif
  return seen;
}

// What a block of queries sees at most and at least: the ends of its rows' ranges.
struct BlockBounds {
  int min_low;
  int max_low;
  int min_high;
  int max_high;

  // No query of the block sees any key in first .. last - 1.
  METAL_FUNC bool hides(int first, int last, const thread ScoreTerms& terms) const thread {
#if HAS_PREFIX
    if (first < terms.prefix && last > 0) return false;
#endif
    return last <= min_low || first >= max_high;
  }

  // Every query sees every key in first .. last - 1; segments are compared key by key, so never with those.
  METAL_FUNC bool shows(int first, int last, const thread ScoreTerms& terms) const thread {
#if HAS_SEGMENTS
    return false;
#else
#if HAS_PREFIX
    if (first >= 0 && last <= terms.prefix) return true;
#endif
    return first >= max_low && last <= min_high;
#endif
  }

  // Keys to look at: from first() to last() - 1, and between them those that `hides` does not rule out.
  METAL_FUNC int first(const thread ScoreTerms& terms) const thread {
#if HAS_PREFIX
    if (terms.prefix > 0) return 0;
#endif
    return min_low;
  }

  METAL_FUNC int last(const thread ScoreTerms& terms) const thread {
#if HAS_PREFIX
    return max(max_high, terms.prefix);
#else
    return max_high;
#endif
  }
};

// All threads copy the diagonals of a tile, key - query from `origin` on, into threadgroup memory.
template <int COUNT>
METAL_FUNC void stage_diagonals(
    threadgroup float* tile, const device float* diagonals, int origin, int query_length, int key_length,
    uint thread_index) {
  for (int i = int(thread_index); i < COUNT; i += THREADS) {
    const int diagonal = origin + i + query_length - 1;
    const bool exists = diagonal >= 0 && diagonal < query_length + key_length - 1;
    tile[i] = exists ? LOG2E * diagonals[diagonal] : 0.0f;
  }
}

// ----------------------------------------------------------------------------------------------------- dropout
// The counter-based hash of dropout.py: the same bits in every implementation.

METAL_FUNC uint dropout_mix(uint x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

METAL_FUNC uint dropout_row(uint key_0, uint key_1, uint head, uint query) {
  return dropout_mix(dropout_mix(dropout_mix(head + key_0) ^ key_1) + query);
}

#if HAS_DROPOUT
// A weight or its gradient after dropout.
METAL_FUNC float dropped(float x, uint row, int key, const thread ScoreTerms& terms) {
  const uint number = terms.dropout_key_origin + uint(key);
  return dropout_mix(row ^ (number * 0x9E3779B9u)) >= DROPOUT_THRESHOLD ? x * DROPOUT_SCALE : 0.0f;
}
#endif

// --------------------------------------------------------------------------------------------------- gradients

// One element of the backward pass.
struct ElementGradient {
  float weight;   // after dropout: what multiplies the value
  float score;    // gradient of the score, where biases are added
  float product;  // gradient of scale * q.k, before the soft-cap
};

// From the product q.k and the gradient of the weight, dO.v. lse is in base 2; LARGEST_LSE makes all of it 0.
METAL_FUNC ElementGradient element_gradient(
    float product, float weight_gradient, float lse, float delta, const thread QueryRow& row, int key, bool seen,
    const thread ScoreTerms& terms) {
  float cap_slope;
  const float score = score_of(product, row, key, terms, cap_slope);
  const float weight = seen ? fast::exp2(score - lse) : 0.0f;
  ElementGradient result;
  result.weight = weight;
#if HAS_DROPOUT
  result.weight = dropped(weight, row.dropout, key, terms);
  weight_gradient = dropped(weight_gradient, row.dropout, key, terms);
#endif
  result.score = weight * (weight_gradient - delta);
  result.product = result.score * cap_slope;
  return result;
}

// ------------------------------------------------------------------------------------------------------ decode

#if IS_DECODE
template <int COUNT>
struct Elements {
  element_t elements[COUNT];
};
typedef Elements<HEAD_CHUNK> KeyChunk;
typedef Elements<VALUE_CHUNK> ValueChunk;

// COUNT neighbouring elements of a row; a row past the last repeats it, columns past WIDTH are 0.
template <int COUNT, int WIDTH>
METAL_FUNC Elements<COUNT> load_chunk(Matrix source, int row, int column) {
  const device element_t* start = source.data + min(row, source.rows - 1) * source.row_stride;
  Elements<COUNT> chunk;
  if (WIDTH % 8 == 0 && source.column_stride == 1) {
    chunk = *(const device Elements<COUNT>*)(start + column);
  } else {
    UNROLL
    for (int e = 0; e < COUNT; ++e) {
      chunk.elements[e] = element_t(0.0f);
      if (column + e < WIDTH) chunk.elements[e] = start[(column + e) * source.column_stride];
    }
  }
  return chunk;
}
#endif
