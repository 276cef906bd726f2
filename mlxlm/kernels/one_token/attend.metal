// One query a head against the first position + 1 keys of a cache that has room for more. LANES lanes read a key
// together, so a simdgroup looks at KEYS keys at a time; each such group keeps a running maximum, sum and output of its
// own, and they meet at the end. Threadgroups of the second axis share the keys.
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const int head = int(threadgroup_position_in_grid.x);
const int split = int(threadgroup_position_in_grid.y);
const int splits = int(threadgroups_per_grid.y);
const int member = lane % LANES;
const int owner = lane / LANES;

const int length = position[0] + 1;
const int low = WINDOW > 0 ? max(0, length - WINDOW) : 0;
const int share = (length - low + splits - 1) / splits;
const int begin = low + split * share;
const int end = min(length, begin + share);

const int64_t rows = int64_t(head / GROUP) * keys_shape[2];
const device element_t* key_rows = keys + rows * HEAD_DIM;
const device element_t* value_rows = values + rows * HEAD_DIM;

float asked[PARTS * CHUNK];
float sums[PARTS * CHUNK];
UNROLL
for (int part = 0; part < PARTS; ++part) {
  const int column = (part * LANES + member) * CHUNK;
  UNROLL
  for (int e = 0; e < CHUNK; ++e) {
    asked[part * CHUNK + e] = column < HEAD_DIM ? float(query[head * HEAD_DIM + column + e]) * SCALE : 0.0f;
    sums[part * CHUNK + e] = 0.0f;
  }
}
float highest = LOWEST;
float total = 0.0f;

constexpr int STEP = SIMDGROUPS * KEYS;
for (int base = begin + simdgroup * KEYS; base < end; base += FLIGHT * STEP) {
  Chunk key_chunks[FLIGHT * PARTS];
  Chunk value_chunks[FLIGHT * PARTS];
  UNROLL
  for (int f = 0; f < FLIGHT; ++f) {
    const int key = min(base + f * STEP + owner, end - 1);
    UNROLL
    for (int part = 0; part < PARTS; ++part) {
      const int column = min((part * LANES + member) * CHUNK, HEAD_DIM - CHUNK);  // past the end: a factor of 0
      key_chunks[f * PARTS + part] = *(const device Chunk*)(key_rows + int64_t(key) * HEAD_DIM + column);
      value_chunks[f * PARTS + part] = *(const device Chunk*)(value_rows + int64_t(key) * HEAD_DIM + column);
    }
  }
  float scores[FLIGHT];
  float maximum = highest;
  UNROLL
  for (int f = 0; f < FLIGHT; ++f) {
    float score = 0.0f;
    UNROLL
    for (int i = 0; i < PARTS * CHUNK; ++i) {
      score += asked[i] * float(key_chunks[f * PARTS + i / CHUNK].elements[i % CHUNK]);
    }
    UNROLL
    for (int mask = 1; mask < LANES; mask *= 2) score += simd_shuffle_xor(score, ushort(mask));
#if HAS_SOFTCAP
    score = SOFTCAP * precise::tanh(score / SOFTCAP);
#endif
    scores[f] = base + f * STEP + owner < end ? score * LOG2E : MASKED;
    maximum = max(maximum, scores[f]);
  }
  const float factor = exp2(highest - maximum);
  highest = maximum;
  total *= factor;
  UNROLL
  for (int i = 0; i < PARTS * CHUNK; ++i) sums[i] *= factor;
  UNROLL
  for (int f = 0; f < FLIGHT; ++f) {
    const float weight = exp2(scores[f] - highest);
    total += weight;
    UNROLL
    for (int i = 0; i < PARTS * CHUNK; ++i) {
      sums[i] += weight * float(value_chunks[f * PARTS + i / CHUNK].elements[i % CHUNK]);
    }
  }
}

UNROLL
for (int mask = LANES; mask < 32; mask *= 2) {
  const float maximum = max(highest, simd_shuffle_xor(highest, ushort(mask)));
  const float factor = exp2(highest - maximum);
  highest = maximum;
  total *= factor;
  total += simd_shuffle_xor(total, ushort(mask));
  UNROLL
  for (int i = 0; i < PARTS * CHUNK; ++i) {
    sums[i] *= factor;
    sums[i] += simd_shuffle_xor(sums[i], ushort(mask));
  }
}

threadgroup float shared_sums[SIMDGROUPS * HEAD_DIM];
threadgroup float shared_highest[SIMDGROUPS];
threadgroup float shared_total[SIMDGROUPS];
if (owner == 0) {
  UNROLL
  for (int i = 0; i < PARTS * CHUNK; ++i) {
    const int column = (i / CHUNK * LANES + member) * CHUNK + i % CHUNK;
    if (column < HEAD_DIM) shared_sums[simdgroup * HEAD_DIM + column] = sums[i];
  }
}
if (lane == 0) {
  shared_highest[simdgroup] = highest;
  shared_total[simdgroup] = total;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int column = simdgroup * 32 + lane; column < HEAD_DIM; column += 32 * SIMDGROUPS) {
  float maximum = LOWEST;
  for (int s = 0; s < SIMDGROUPS; ++s) maximum = max(maximum, float(shared_highest[s]));
  float found = 0.0f;
  float weights = 0.0f;
  for (int s = 0; s < SIMDGROUPS; ++s) {
    const float factor = exp2(float(shared_highest[s]) - maximum);
    found += factor * shared_sums[s * HEAD_DIM + column];
    weights += factor * shared_total[s];
  }
#if PARTIAL
  out[(head * splits + split) * HEAD_DIM + column] = found;
  if (column == 0) {
    weight[2 * (head * splits + split)] = maximum;
    weight[2 * (head * splits + split) + 1] = weights;
  }
#else
  out[head * HEAD_DIM + column] = element_t(found / weights);
#endif
}
