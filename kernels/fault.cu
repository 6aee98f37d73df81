// A kernel that fails, for tests of what a failed device does to a server. Compiled with the feature `fault-injection` alone.
#include "common/common.cuh"

struct Params {
    unsigned long long unused;
};

KERNEL __launch_bounds__(32) fault_trap(const __grid_constant__ Params p) { __trap(); }
