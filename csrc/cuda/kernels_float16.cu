// The kernels for float16 logits.
#include "launch.cuh"

template cudaError_t safecode::cuda::launch<safecode::cuda::Float16>(Call, const Plan&, const Task&, cudaStream_t);
