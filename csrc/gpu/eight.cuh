// A thread reads and writes eight neighbouring elements, in one access where the addresses allow
// it.
#pragma once

#include "codec.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

static constexpr int kEight = 8;

template <class S>
struct alignas(sizeof(S) * kEight > 16 ? 16 : sizeof(S) * kEight) Eight {
  S of[kEight];
};

// whether rows, `stride` elements apart and beginning at `address`, can be accessed eight elements
// at a time
template <class S>
static inline bool in_eights(const void* address, int64_t stride) {
  return reinterpret_cast<uintptr_t>(address) % alignof(Eight<S>) == 0 && stride % kEight == 0;
}

// the first n of eight elements, or all of them in one access if `whole`
template <class S>
static FLUXFAST_FN Eight<S> load_eight(const S* from, int64_t n, bool whole) {
  if (whole) return *reinterpret_cast<const Eight<S>*>(from);
  Eight<S> x = {};
  for (int i = 0; i < kEight && i < n; ++i) x.of[i] = from[i];
  return x;
}

template <class S>
static FLUXFAST_FN void store_eight(S* to, const Eight<S>& x, int64_t n, bool whole) {
  if (whole) {
    *reinterpret_cast<Eight<S>*>(to) = x;
    return;
  }
  for (int i = 0; i < kEight && i < n; ++i) to[i] = x.of[i];
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
