// The ops for this processor.
#pragma once

#include <string>
#include <vector>

#include "ops.h"

namespace fluxfast {

// the instruction sets that this build has and this processor runs, the best last
std::vector<std::string> cpu_isas();

// throws std::invalid_argument on a name that cpu_isas does not list
void use_cpu_isa(const std::string& isa);

// the ops of the instruction set in use: the best, unless use_cpu_isa said otherwise
const CpuOps& cpu();

}  // namespace fluxfast
