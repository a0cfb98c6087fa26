// The numbers by which Python names what a weight is made of; CPU and GPU sources share them.
#pragma once

#include <stdint.h>

namespace fluxfast {

// of floats in memory; the numbers are fluxfast/quant/_rows.py's
enum class Float : int64_t { f32 = 0, bf16 = 1, f16 = 2 };

// of codes with one scale a row, likewise
enum class Code : int64_t { int8 = 0, e4m3 = 1 };

}  // namespace fluxfast
