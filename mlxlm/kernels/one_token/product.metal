// A vector times a weight, two of its rows a simdgroup: before it the norm, after it what follows. Where the vector is
// normed or the weight quantized, and it fits, a threadgroup prepares it once in threadgroup memory (STAGED).
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const int slot = int(threadgroup_position_in_grid.x) * SIMDGROUPS + simdgroup;

#if HAS_NORM
float squares = 0.0f;
for (int k = lane * CHUNK; k < INPUTS; k += 32 * CHUNK) {
  const Chunk values = *(const device Chunk*)(x + k);
  UNROLL
  for (int e = 0; e < CHUNK; ++e) squares += float(values.elements[e]) * float(values.elements[e]);
}
const float normalizer = rsqrt(simd_sum(squares) / float(INPUTS) + NORM_EPS);
#if NORM_ROUNDED
#define NORMED(value, k) rounded(rounded((value) * normalizer) * norm[k])
#else
#define NORMED(value, k) rounded((value) * normalizer * norm[k])
#endif
#else
#define NORMED(value, k) (value)
#endif

#if BITS
// Values of 4 or 8 bits, the lowest bits first: value = scale * number + bias, one of each for GROUP_SIZE numbers.
constexpr int VALUES = 128 / BITS;  // numbers that a lane reads at once
constexpr int PACKED = 32 / BITS;
#else
constexpr int VALUES = CHUNK;
#endif
constexpr int SPAN = 32 * VALUES;  // and the simdgroup

#if STAGED
// Lanes read VALUES neighbours each, chunk by chunk: the chunks that they read at the same time stand side by side.
threadgroup Chunk staged[(INPUTS + SPAN - 1) / SPAN * SPAN / CHUNK];
for (int k = (simdgroup * 32 + lane) * CHUNK; k < INPUTS; k += 32 * SIMDGROUPS * CHUNK) {
  Chunk chunk = *(const device Chunk*)(x + k);
#if HAS_NORM
  UNROLL
  for (int e = 0; e < CHUNK; ++e) chunk.elements[e] = element_t(NORMED(float(chunk.elements[e]), k + e));
#endif
  staged[(k / SPAN * SPAN + k % VALUES / CHUNK * 32 * CHUNK) / CHUNK + k % SPAN / VALUES] = chunk;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
#define PREPARED(k, c) staged[(k) / SPAN * (SPAN / CHUNK) + (c) * 32 + lane]
#define VALUE(value, k) (value)
#else
#define PREPARED(k, c) *(const device Chunk*)(x + (k) + (c) * CHUNK)
#define VALUE(value, k) NORMED(value, k)
#endif
if (slot >= (OUTPUTS + 1) / 2) return;

#if HAS_HEADS
const int head = slot / (HEAD_DIM / 2);
const int pair = slot % (HEAD_DIM / 2);
#if INTERLEAVED
const int first = head * HEAD_DIM + 2 * pair;
const int second = first + 1;
#else
const bool apart = pair < ROTATED / 2;  // turned features stand half of their number apart, the others side by side
const int first = head * HEAD_DIM + (apart ? pair : 2 * pair);
const int second = first + (apart ? ROTATED / 2 : 1);
#endif
#elif GATED
const int first = slot;
const int second = slot + OUTPUTS / 2;
#else
const int first = 2 * slot;
const int second = min(first + 1, OUTPUTS - 1);  // the last row twice where their number is odd
#endif

float sum = 0.0f;
float other_sum = 0.0f;
#if BITS
for (int k = lane * VALUES; k < INPUTS; k += SPAN) {
  const int64_t place = int64_t(first) * INPUTS + k;
  const int64_t other_place = int64_t(second) * INPUTS + k;
  const Words numbers = *(const device Words*)(weight + place / PACKED);
  const Words other_numbers = *(const device Words*)(weight + other_place / PACKED);
  float values = 0.0f;
  float products = 0.0f;
  float other_products = 0.0f;
  UNROLL
  for (int c = 0; c < VALUES / CHUNK; ++c) {
    const Chunk chunk = PREPARED(k, c);
    UNROLL
    for (int e = 0; e < CHUNK; ++e) {
      const int i = c * CHUNK + e;
      const float value = VALUE(float(chunk.elements[e]), k + i);
      values += value;
      products += value * number(numbers.words[i / PACKED] >> (i % PACKED * BITS));
      other_products += value * number(other_numbers.words[i / PACKED] >> (i % PACKED * BITS));
    }
  }
  sum += float(scales[place / GROUP_SIZE]) * products + float(biases[place / GROUP_SIZE]) * values;
  other_sum +=
      float(scales[other_place / GROUP_SIZE]) * other_products + float(biases[other_place / GROUP_SIZE]) * values;
}
#else
const int64_t row = int64_t(first) * INPUTS;
const int64_t other_row = int64_t(second) * INPUTS;
for (int k = lane * CHUNK; k < INPUTS; k += SPAN) {
  const Chunk factors = *(const device Chunk*)(weight + row + k);
  const Chunk other_factors = *(const device Chunk*)(weight + other_row + k);
  const Chunk chunk = PREPARED(k, 0);
  UNROLL
  for (int e = 0; e < CHUNK; ++e) {
    const float value = VALUE(float(chunk.elements[e]), k + e);
    sum += value * float(factors.elements[e]);
    other_sum += value * float(other_factors.elements[e]);
  }
}
#endif
sum = simd_sum(sum);
other_sum = simd_sum(other_sum);
if (lane != 0) return;
#if HAS_BIAS
sum += float(bias[first]);
other_sum += float(bias[second]);
#endif
sum = rounded(sum);
other_sum = rounded(other_sum);

#if HAS_HEADS
if (head < QUERY_HEADS + KEY_HEADS && pair < ROTATED / 2) {
  const float angle = float(position[0]) * inverse[pair];
  const float cosine = precise::cos(angle);
  const float sine = precise::sin(angle);
  const float turned = sum * cosine - other_sum * sine;
  other_sum = other_sum * cosine + sum * sine;
  sum = turned;
}
constexpr int KEYS_BEGIN = QUERY_HEADS * HEAD_DIM;
constexpr int VALUES_BEGIN = KEYS_BEGIN + KEY_HEADS * HEAD_DIM;
if (first < KEYS_BEGIN) {
  query[first] = element_t(sum);
  query[second] = element_t(other_sum);
} else if (first < VALUES_BEGIN) {
  key[first - KEYS_BEGIN] = element_t(sum);
  key[second - KEYS_BEGIN] = element_t(other_sum);
} else {
  value[first - VALUES_BEGIN] = element_t(sum);
  value[second - VALUES_BEGIN] = element_t(other_sum);
}
#elif GATED
out[slot] = element_t(rounded(activate(sum)) * other_sum);
#else
#if HAS_ACTIVATION
sum = activate(sum);
other_sum = activate(other_sum);
#endif
#if HAS_ADDED
sum += float(added[first]);
other_sum += float(added[second]);
#endif
out[first] = element_t(sum);
out[second] = element_t(other_sum);
#endif
