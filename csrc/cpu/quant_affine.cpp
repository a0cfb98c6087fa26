// int4 and int2: a uniform grid per group of columns, w = scale * (unit * code - zero), searched
// for least squared error. fluxfast/quant/affine.py explains the search and why its sums are exact;
// names are the same there.
//
// kGroups groups are searched at a time, one per SIMD lane: element k of group g is u[k][g].
#include "quant_rows.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

static constexpr int kGroups = 16;
// 2^-100; a group with a smaller step becomes all zeros
static constexpr float kLeastStep = 7.888609052210118e-31f;
// larger than any error
static constexpr float kHuge = 1e38f;

struct Int4Grid : Int4Format {
  static constexpr int kTop = 15, kStarts = 2, kRefits = 2;
  static constexpr float kPerGrain = 256.0f;
  static constexpr float kShrinks[kStarts] = {1.0f, 0.92f};
  static constexpr int kBits = 4;

  static inline float least_step() { return kLeastStep; }
  static inline int32_t store(float scale) { return BF16::store(scale); }
  static inline float value(int32_t stored) { return BF16::load(static_cast<uint16_t>(stored)); }
};

struct Int2Grid : Int2Format {
  static constexpr int kTop = 3, kStarts = 3, kRefits = 1;
  static constexpr float kPerGrain = 1024.0f;
  static constexpr float kShrinks[kStarts] = {1.0f, 0.75f, 0.5f};
  static constexpr int kBits = 2;

  float global_scale, per_global;

  explicit Int2Grid(float global) : global_scale(global), per_global(1.0f / global) {}

  // half of the step that byte 0 stands for
  inline float least_step() const {
    const float least = global_scale * (kUnit * 2.3283064365386963e-10f);
    return least > kLeastStep ? least : kLeastStep;
  }
  inline int32_t store(float scale) const {
    const int32_t bits = static_cast<int32_t>(bits_of(scale * per_global)) + (1 << (kShift - 1));
    int32_t stored = (bits >> kShift) - kBias;
    stored = stored < 0 ? 0 : stored;
    return stored > 255 ? 255 : stored;
  }
  inline float value(int32_t stored) const { return Int2Format::value(stored, global_scale); }
};

static inline float clamped(float x, float top) {
  x = x < 0.0f ? 0.0f : x;
  return x > top ? top : x;
}

// the groups that are searched, and what was found
template <class Grid>
struct Tile {
  float u[Grid::kGroup][kGroups];
  float step[kGroups], per_step[kGroups], u_low[kGroups], u_high[kGroups], u_sum[kGroups];
  int32_t stored[kGroups];
  float zero[kGroups];
  // the packed codes, four bytes in an integer, in little-endian order
  uint32_t words[Grid::kGroup * Grid::kBits / 32][kGroups];
};

// from weights to steps of the min-max grid; compilers vectorise a loop over lanes with one loop
// inside, but not with two
template <class Grid>
static void to_steps(const Grid& grid, Tile<Grid>& tile) {
  const float least_step = grid.least_step();
  float lows[kGroups], highs[kGroups];
#pragma omp simd
  for (int g = 0; g < kGroups; ++g) {
    float low = 0.0f, high = 0.0f;
    for (int k = 0; k < Grid::kGroup; ++k) {
      const float w = tile.u[k][g];
      low = w < low ? w : low;
      high = w > high ? w : high;
    }
    lows[g] = low;
    highs[g] = high;
  }
#pragma omp simd
  for (int g = 0; g < kGroups; ++g) {
    float step = highs[g] * (1.0f / Grid::kTop) - lows[g] * (1.0f / Grid::kTop);
    step = step < least_step ? 0.0f : step;
    const float per_step = step == 0.0f ? 0.0f : 1.0f / step;
    tile.step[g] = step;
    tile.per_step[g] = per_step;
    tile.u_low[g] = lows[g] * per_step;
    tile.u_high[g] = highs[g] * per_step;
  }
#pragma omp simd
  for (int g = 0; g < kGroups; ++g) {
    float sum = 0.0f;
    for (int k = 0; k < Grid::kGroup; ++k) {
      const float u = round_even(tile.u[k][g] * tile.per_step[g] * Grid::kPerGrain) * (1.0f / Grid::kPerGrain);
      tile.u[k][g] = u;
      sum += u;
    }
    tile.u_sum[g] = sum;
  }
}

template <class Grid>
struct Fit {
  float per_size[kGroups], z[kGroups];
  float q_sum[kGroups], qq_sum[kGroups], uq_sum[kGroups];
};

// a * b + c where the product is exact, so that contracting it makes no difference
static inline float exact_sum(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

template <class Grid>
static inline float code_of(float u, float per_size, float z) {
  return round_even(clamped(u * per_size + z, Grid::kTop));
}

template <class Grid>
static void sum_codes(const Tile<Grid>& tile, Fit<Grid>& fit) {
#pragma omp simd
  for (int g = 0; g < kGroups; ++g) {
    const float per_size = fit.per_size[g], z = fit.z[g];
    float q_sum = 0.0f, qq_sum = 0.0f, uq_sum = 0.0f;
    for (int k = 0; k < Grid::kGroup; ++k) {
      const float u = tile.u[k][g];
      const float q = code_of<Grid>(u, per_size, z);
      q_sum += q;
      qq_sum = exact_sum(q, q, qq_sum);
      uq_sum = exact_sum(u, q, uq_sum);
    }
    fit.q_sum[g] = q_sum;
    fit.qq_sum[g] = qq_sum;
    fit.uq_sum[g] = uq_sum;
  }
}

template <class Grid>
static void search(const Grid& grid, Tile<Grid>& tile) {
  constexpr float unit = Grid::kUnit, per_unit = 1.0f / Grid::kUnit, group = Grid::kGroup;
  float least[kGroups], start[kGroups], size[kGroups], zero[kGroups];
  float best_per_size[kGroups], best_z[kGroups];
  int32_t stored[kGroups];
  Fit<Grid> fit;
  for (int g = 0; g < kGroups; ++g) least[g] = kHuge;
  for (float shrink_low : Grid::kShrinks) {
    for (float shrink_high : Grid::kShrinks) {
#pragma omp simd
      for (int g = 0; g < kGroups; ++g) {
        start[g] = tile.u_low[g] * shrink_low;
        size[g] = (tile.u_high[g] * shrink_high - start[g]) * (1.0f / Grid::kTop);
      }
      for (int fits = 0; fits <= Grid::kRefits; ++fits) {
#pragma omp simd
        for (int g = 0; g < kGroups; ++g) {
          stored[g] = grid.store(size[g] * tile.step[g] * per_unit);
          size[g] = grid.value(stored[g]) * unit * tile.per_step[g];
          fit.per_size[g] = size[g] > 0.0f ? 1.0f / size[g] : 0.0f;
          zero[g] = round_even(clamped(-start[g] * fit.per_size[g] * unit, unit * Grid::kTop));
          fit.z[g] = zero[g] * per_unit;
        }
        sum_codes(tile, fit);
#pragma omp simd
        for (int g = 0; g < kGroups; ++g) {
          const float z = fit.z[g], s = size[g], u_sum = tile.u_sum[g];
          const float q_sum = fit.q_sum[g], qq_sum = fit.qq_sum[g], uq_sum = fit.uq_sum[g];
          const float error = (s * s) * ((qq_sum - 2.0f * z * q_sum) + group * (z * z)) - 2.0f * s * (uq_sum - z * u_sum);
          const bool is_better = error < least[g];
          least[g] = is_better ? error : least[g];
          tile.stored[g] = is_better ? stored[g] : tile.stored[g];
          tile.zero[g] = is_better ? zero[g] : tile.zero[g];
          best_per_size[g] = is_better ? fit.per_size[g] : best_per_size[g];
          best_z[g] = is_better ? z : best_z[g];
          const float covariance = group * uq_sum - u_sum * q_sum;
          const float variance = group * qq_sum - q_sum * q_sum;
          const bool is_fit = (covariance > 0.0f) & (variance > 0.0f);
          const float fitted = covariance / variance;
          start[g] = is_fit ? (u_sum - fitted * q_sum) * (1.0f / group) : -(z * s);
          size[g] = is_fit ? fitted : s;
        }
      }
    }
  }
  constexpr int kPerByte = 8 / Grid::kBits, kPerWord = 32 / Grid::kBits;
  for (int word = 0; word < Grid::kGroup / kPerWord; ++word) {
#pragma omp simd
    for (int g = 0; g < kGroups; ++g) {
      int32_t bits = 0;
      for (int i = 0; i < kPerWord; ++i) {
        const float u = tile.u[word * kPerWord + i][g];
        const int32_t code = static_cast<int32_t>(code_of<Grid>(u, best_per_size[g], best_z[g]));
        bits |= code << (i / kPerByte * 8 + (kPerByte - 1 - i % kPerByte) * Grid::kBits);
      }
      tile.words[word][g] = static_cast<uint32_t>(bits);
    }
  }
}

// searches a row's groups, kGroups at a time, and calls done(first group, number of groups, tile)
template <class T, class Grid, class Done>
static void quantize_row(const typename T::Stored* x, int64_t cols, const Grid& grid, const Done& done) {
  const int64_t groups = ceil_div(cols, Grid::kGroup);
  Tile<Grid> tile;
  for (int64_t first = 0; first < groups; first += kGroups) {
    const int count = static_cast<int>(min64(kGroups, groups - first));
    if (first + kGroups > groups || groups * Grid::kGroup > cols) memset(tile.u, 0, sizeof tile.u);
    for (int g = 0; g < count; ++g) {
      const typename T::Stored* in = x + (first + g) * Grid::kGroup;
      const int n = static_cast<int>(min64(Grid::kGroup, cols - (first + g) * Grid::kGroup));
      for (int k = 0; k < n; ++k) tile.u[k][g] = T::load(in[k]);
    }
    to_steps(grid, tile);
    search(grid, tile);
    done(first, count, tile);
  }
}

template <class Grid>
static inline void store_codes(const Tile<Grid>& tile, int g, uint8_t* packed) {
  for (const auto& word : tile.words) {
    memcpy(packed, &word[g], sizeof word[g]);
    packed += sizeof word[g];
  }
}

void quantize_int4(Weight weight, Int4Parts parts, int threads) {
  constexpr int kBytes = Int4Grid::kGroup / 2;
  const int64_t groups = ceil_div(weight.cols, Int4Grid::kGroup);
  with_type(weight.type, [&](auto type) {
    using T = decltype(type);
    for_each_row(weight.rows, weight.cols, threads, [&](int64_t row) {
      const typename T::Stored* x = row_of<T>(weight, row);
      uint16_t* const scale = parts.scale + row * groups;
      if (top_of<T>(x, weight.cols) >= kInfinity) {
        scale[0] = static_cast<uint16_t>(kInfinity >> 16);
        return;
      }
      quantize_row<T>(x, weight.cols, Int4Grid{}, [&](int64_t first, int count, const Tile<Int4Grid>& tile) {
        for (int g = 0; g < count; ++g) {
          scale[first + g] = static_cast<uint16_t>(tile.stored[g]);
          parts.zero[row * groups + first + g] = static_cast<uint8_t>(tile.zero[g]);
          store_codes(tile, g, parts.packed + (row * groups + first + g) * kBytes);
        }
      });
    });
  });
}

// the largest step of the whole weight
static float largest_magnitude(const Weight& weight, int threads) {
  const RowTasks tasks({1, weight.rows, weight.cols}, 1);
  uint32_t* const tops = static_cast<uint32_t*>(calloc(tasks.count(1), sizeof(uint32_t)));
  with_type(weight.type, [&](auto type) {
    using T = decltype(type);
    parallel_for(tasks.count(1), threads, [&](int64_t task) {
      for (int64_t row = tasks.begin(task); row < tasks.end(task); ++row) {
        const uint32_t top = top_of<T>(row_of<T>(weight, row), weight.cols);
        tops[task] = top > tops[task] ? top : tops[task];
      }
    });
  });
  uint32_t top = 0;
  for (int64_t task = 0; task < tasks.count(1); ++task) top = tops[task] > top ? tops[task] : top;
  free(tops);
  return float_of(top);
}

void quantize_int2(Weight weight, Int2Parts parts, int threads) {
  constexpr int kBytes = Int2Grid::kGroup / 4;
  const int64_t groups = ceil_div(weight.cols, Int2Grid::kGroup);
  const int64_t zero_bytes = ceil_div(groups, 2);
  const float top = largest_magnitude(weight, threads);
  // a step is at most 2 / 3 of the largest weight, its scale a fifth of that, and a byte's highest
  // value 1.875
  float global_scale = top / (1.875f * 5.0f * 3.0f / 2.0f);
  if (global_scale < kLeastNormal) global_scale = 1.0f;
  *parts.global_scale = global_scale;
  if (bits_of(top) >= kInfinity) return;
  const Int2Grid grid(global_scale);
  with_type(weight.type, [&](auto type) {
    using T = decltype(type);
    for_each_row(weight.rows, weight.cols, threads, [&](int64_t row) {
      uint8_t* const zeros = parts.zero + row * zero_bytes;
      quantize_row<T>(row_of<T>(weight, row), weight.cols, grid, [&](int64_t first, int count, const Tile<Int2Grid>& tile) {
        for (int g = 0; g < count; ++g) {
          parts.scale[row * groups + first + g] = static_cast<uint8_t>(tile.stored[g]);
          const int32_t zero = static_cast<int32_t>(tile.zero[g]);
          // kGroups is even, so the two groups of a byte are in one tile
          uint8_t& byte = zeros[(first + g) / 2];
          byte = static_cast<uint8_t>(g % 2 ? byte | zero : zero << 4);
          store_codes(tile, g, parts.packed + (row * groups + first + g) * kBytes);
        }
      });
    });
  });
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
