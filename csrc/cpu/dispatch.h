// Choosing the ops for this processor.
#pragma once

#include <string>
#include <vector>

#include "ops.h"

namespace fluxfast {

// the instruction sets that this build has and this processor can run, the best last
std::vector<std::string> cpu_isas();

// throws std::invalid_argument on a name that cpu_isas does not list
void use_cpu_isa(const std::string& isa);

// the ops of the instruction set in use, which is the best one unless use_cpu_isa chose another
const CpuOps& cpu();

}  // namespace fluxfast
