// The kernels for bfloat16 logits.
#include "launch.cuh"

template cudaError_t safecode::cuda::launch<safecode::cuda::BFloat16>(Call, const Plan&, const Task&, cudaStream_t);
