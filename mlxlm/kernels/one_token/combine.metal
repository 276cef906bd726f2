// What the threadgroups of a head found, put together: one threadgroup a head, one thread a feature.
const int head = int(threadgroup_position_in_grid.x);
const int column = int(simdgroup_index_in_threadgroup) * 32 + int(thread_index_in_simdgroup);
if (column >= HEAD_DIM) return;
const int splits = partial_shape[1];
float maximum = LOWEST;
for (int s = 0; s < splits; ++s) maximum = max(maximum, float(weight[2 * (head * splits + s)]));
float found = 0.0f;
float weights = 0.0f;
for (int s = 0; s < splits; ++s) {
  const float factor = exp2(float(weight[2 * (head * splits + s)]) - maximum);
  found += factor * partial[(head * splits + s) * HEAD_DIM + column];
  weights += factor * weight[2 * (head * splits + s) + 1];
}
out[head * HEAD_DIM + column] = element_t(found / weights);
