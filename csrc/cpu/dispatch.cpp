#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace fluxfast {

namespace baseline {
extern const CpuOps ops;
}
#ifdef FLUXFAST_X86_ISAS
namespace avx2 {
extern const CpuOps ops;
}
namespace avx512 {
extern const CpuOps ops;
}
#endif

namespace {

const std::vector<const CpuOps*>& available() {
  static const std::vector<const CpuOps*> tables = [] {
    std::vector<const CpuOps*> found = {&baseline::ops};
#ifdef FLUXFAST_X86_ISAS
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx2) found.push_back(&avx2::ops);
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(&avx512::ops);
    }
#endif
    return found;
  }();
  return tables;
}

std::atomic<const CpuOps*>& in_use() {
  static std::atomic<const CpuOps*> table{available().back()};
  return table;
}

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const CpuOps* table : available()) names.push_back(table->isa);
  return names;
}

void use_cpu_isa(const std::string& isa) {
  for (const CpuOps* table : available()) {
    if (isa == table->isa) {
      in_use() = table;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + isa + "' is not in this build, or not on this processor");
}

const CpuOps& cpu() { return *in_use(); }

}  // namespace fluxfast
