// Heads that were projected already: queries and keys normed feature by feature, then turned by their position; values
// as they are. A simdgroup a head, a pair of features a lane at a time.
const int lane = int(thread_index_in_simdgroup);
const int head = int(threadgroup_position_in_grid.x) * SIMDGROUPS + int(simdgroup_index_in_threadgroup);
if (head >= QUERY_HEADS + 2 * KEY_HEADS) return;
const bool is_query = head < QUERY_HEADS;
const bool is_value = head >= QUERY_HEADS + KEY_HEADS;

float squares = 0.0f;
for (int i = lane; i < HEAD_DIM; i += 32) squares += float(heads[head * HEAD_DIM + i]) * float(heads[head * HEAD_DIM + i]);
const float normalizer = rsqrt(simd_sum(squares) / float(HEAD_DIM) + NORM_EPS);

for (int pair = lane; pair < HEAD_DIM / 2; pair += 32) {
#if INTERLEAVED
  const int first = 2 * pair;
  const int second = first + 1;
#else
  const bool apart = pair < ROTATED / 2;
  const int first = apart ? pair : 2 * pair;
  const int second = first + (apart ? ROTATED / 2 : 1);
#endif
  float a = float(heads[head * HEAD_DIM + first]);
  float b = float(heads[head * HEAD_DIM + second]);
  if (!is_value) {
    const float a_scale = is_query ? query_norm[first] : key_norm[first];
    const float b_scale = is_query ? query_norm[second] : key_norm[second];
#if NORM_ROUNDED
    a = rounded(rounded(a * normalizer) * a_scale);
    b = rounded(rounded(b * normalizer) * b_scale);
#else
    a = rounded(a * normalizer * a_scale);
    b = rounded(b * normalizer * b_scale);
#endif
    if (pair < ROTATED / 2) {
      const float angle = float(position[0]) * inverse[pair];
      const float cosine = precise::cos(angle);
      const float sine = precise::sin(angle);
      const float turned = a * cosine - b * sine;
      b = b * cosine + a * sine;
      a = turned;
    }
  }
  if (is_query) {
    query[head * HEAD_DIM + first] = element_t(a);
    query[head * HEAD_DIM + second] = element_t(b);
  } else if (is_value) {
    value[(head - QUERY_HEADS - KEY_HEADS) * HEAD_DIM + first] = element_t(a);
    value[(head - QUERY_HEADS - KEY_HEADS) * HEAD_DIM + second] = element_t(b);
  } else {
    key[(head - QUERY_HEADS) * HEAD_DIM + first] = element_t(a);
    key[(head - QUERY_HEADS) * HEAD_DIM + second] = element_t(b);
  }
}
