// Gradients of the adapters of linears that read the same x, in fp32:
//   dA = (scale * dy B)^T x,  dB = dy^T (scale * x A^T).
// Both narrow products, dy B and x A^T, are made and used for a few rows at a time, while those rows
// are in the cache.
#include "rows.h"
#include "tile.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

static constexpr int64_t kBlockRows = 48;
// the least rows that a task sums over, and the most tasks; each task has sums of its own
static constexpr int64_t kTaskRows = 4 * kBlockRows, kMaxTasks = 16;

static int64_t padded_rank(const LoraAdapter& adapter) { return padded(adapter.rank); }

// Where each adapter's ranks, padded to whole vectors, and its B lie among those of all adapters.
struct Layout {
  int64_t ranks = 0, b_size = 0;

  explicit Layout(const LoraAdapters& adapters) {
    for (int64_t i = 0; i < adapters.count; ++i) {
      ranks += padded_rank(adapters.data[i]);
      b_size += adapters.data[i].cols * padded_rank(adapters.data[i]);
    }
  }
};

// calls body(adapter, its first rank, where its B starts) for every adapter
template <class Body>
static void for_each_adapter(const LoraAdapters& adapters, const Body& body) {
  int64_t rank = 0, b = 0;
  for (int64_t i = 0; i < adapters.count; ++i) {
    const LoraAdapter& adapter = adapters.data[i];
    body(adapter, rank, b);
    rank += padded_rank(adapter);
    b += adapter.cols * padded_rank(adapter);
  }
}

// all A, transposed to [in, ranks], and all B, padded with zeros
static void pack(const LoraAdapters& adapters, const Layout& layout, int64_t in, float* a, float* b) {
  memset(a, 0, sizeof(float) * static_cast<size_t>(in * layout.ranks));
  memset(b, 0, sizeof(float) * static_cast<size_t>(layout.b_size));
  for_each_adapter(adapters, [&](const LoraAdapter& adapter, int64_t rank, int64_t b_at) {
    for (int64_t r = 0; r < adapter.rank; ++r) {
      for (int64_t k = 0; k < in; ++k) a[k * layout.ranks + rank + r] = adapter.a[r * in + k];
    }
    const int64_t padded = padded_rank(adapter);
    for (int64_t n = 0; n < adapter.cols; ++n) {
      memcpy(b + b_at + n * padded, adapter.b + n * adapter.rank, sizeof(float) * static_cast<size_t>(adapter.rank));
    }
  });
}

void lora_grads(Rows x, Rows dy, LoraAdapters adapters, Shape shape, int threads) {
  const Layout layout(adapters);
  const int64_t in = shape.cols, ranks = layout.ranks, a_size = in * ranks;
  const Scratch a(a_size), b(layout.b_size);
  pack(adapters, layout, in, a.data(), b.data());

  const int64_t per_task = max64(kTaskRows, ceil_div(ceil_div(shape.rows, kMaxTasks), kBlockRows) * kBlockRows);
  const int64_t tasks = ceil_div(shape.rows, per_task), sums_size = a_size + layout.b_size;
  const Scratch all_sums(tasks * sums_size);
  parallel_for(tasks, threads, [&](int64_t task) {
    const Scratch s(kBlockRows * ranks), ds(kBlockRows * ranks);
    float *const da = all_sums.data() + task * sums_size, *const db = da + a_size;
    memset(da, 0, sizeof(float) * static_cast<size_t>(sums_size));
    const int64_t end = min64((task + 1) * per_task, shape.rows);
    for (int64_t first = task * per_task; first < end; first += kBlockRows) {
      const int64_t rows = min64(kBlockRows, end - first);
      const float *x_rows = row_at(x, 0, first), *dy_rows = row_at(dy, 0, first);
      product<false>(rows, x_rows, x.row_stride, 1, a.data(), ranks, ranks, in, s.data(), ranks);
      for_each_adapter(adapters, [&](const LoraAdapter& adapter, int64_t rank, int64_t b_at) {
        const int64_t width = padded_rank(adapter);
        const float* dys = dy_rows + adapter.first_col;
        product<false>(rows, dys, dy.row_stride, 1, b.data() + b_at, width, width, adapter.cols, ds.data() + rank, ranks);
        product<true>(adapter.cols, dys, 1, dy.row_stride, s.data() + rank, ranks, width, rows, db + b_at, width);
      });
      product<true>(in, x_rows, 1, x.row_stride, ds.data(), ranks, ranks, rows, da, ranks);
    }
  });

  float* const sums = all_sums.data();
  sum_partials(sums, tasks, sums, {1, tasks, sums_size}, threads);
  for_each_adapter(adapters, [&](const LoraAdapter& adapter, int64_t rank, int64_t b_at) {
    for (int64_t r = 0; r < adapter.rank; ++r) {
      for (int64_t k = 0; k < in; ++k) adapter.da[r * in + k] = adapter.scale * sums[k * ranks + rank + r];
    }
    const float* db = sums + a_size + b_at;
    for (int64_t n = 0; n < adapter.cols; ++n, db += padded_rank(adapter)) {
      for (int64_t r = 0; r < adapter.rank; ++r) adapter.db[n * adapter.rank + r] = adapter.scale * db[r];
    }
  });
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
