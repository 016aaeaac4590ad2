// OpenMP without its header, which belongs to a runtime of the compiler's own; PyTorch's is the one that runs.
#pragma once

extern "C" int omp_get_thread_num();
